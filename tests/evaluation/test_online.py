"""Neighbours and probe while an encoder learns: a plain loop, and what is not defined."""

import math

import numpy as np
import pytest

from medvit.evaluation.online import NEIGHBOURS, TEMPERATURE, neighbour_votes, probe_online


def test_votes_are_a_plain_loop():
    rng = np.random.default_rng(0)
    bank, queries, labels = rng.normal(size=(30, 5)), rng.normal(size=(4, 5)), rng.integers(0, 3, 30)
    found = neighbour_votes(bank, labels, queries)
    for row, query in enumerate(queries):
        cosines = [float(query @ one / np.linalg.norm(query) / np.linalg.norm(one)) for one in bank]
        nearest = sorted(range(30), key=lambda i: -cosines[i])[:NEIGHBOURS]
        expected = [sum(math.exp((cosines[i] - 1) / TEMPERATURE) for i in nearest if labels[i] == k) for k in range(3)]
        assert found[row].tolist() == pytest.approx(expected)


def test_features_that_tell_classes_apart_are_found_good_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels, truth = np.arange(60) % 2, np.arange(40) % 2
    level = np.array([[3.0, 0.0], [0.0, 3.0]])
    good = probe_online(
        level[labels] + rng.normal(size=(60, 2)), labels, level[truth] + rng.normal(size=(40, 2)), truth
    )
    noise = probe_online(rng.normal(size=(60, 2)), labels, rng.normal(size=(40, 2)), truth)
    assert min(good.values()) > 0.9
    assert max(noise.values()) < 0.75


@pytest.mark.parametrize(("labels", "truth"), [([0, 0, 0], [0, 1]), ([0, 1, 1], [1, 1]), ([0, 0, 0], [0, 0])])
def test_a_class_that_is_missing_on_one_side_leaves_nothing_defined(labels, truth):
    values = np.random.default_rng(0).normal(size=(5, 3))
    found = probe_online(values[:3], np.array(labels), values[3:], np.array(truth))
    assert all(math.isnan(value) for value in found.values())
