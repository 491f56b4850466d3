import json
import math

import numpy as np
import pytest
import torch

from medvit.config import EvaluationConfig
from medvit.evaluation.candidates import Sight
from medvit.evaluation.ranking import rank, site_distance
from medvit.objectives.discrepancy import mmd2

SETTINGS = EvaluationConfig(bootstrap=100)


def make_sights(n=60, seed=0):
    """One candidate that sees the finding, one that hardly does, and one that sees nothing."""
    rng = np.random.default_rng(seed)
    labels = np.array(["no", "yes"])[rng.integers(0, 2, n)]
    told = (labels == "yes")[:, None] * np.ones((1, 5))
    features = {"good": 3.0, "fair": 0.4, "none": 0.0}
    sights = {
        name: Sight((strength * told + rng.normal(size=(n, 5))).astype(np.float32), None)
        for name, strength in features.items()
    }
    return sights, labels, np.array([f"p{number}" for number in rng.integers(0, 30, n)]), np.array(["A", "B", ""] * 20)


def test_candidates_stand_in_the_order_of_their_probes_and_the_control_gains_nothing():
    sights, labels, groups, sites = make_sights()
    reversed_sights = dict(reversed(sights.items()))
    ranking = rank(reversed_sights, "none", labels, groups, sites, SETTINGS)
    assert [one.weights for one in ranking.standings] == ["good", "fair", "none"]
    good, _, control = ranking.standings
    assert good.auroc.point - control.auroc.point == pytest.approx(good.gain.point)
    assert good.gain.low > 0
    assert good.normalised_gain == pytest.approx(good.gain.point / (1 - control.auroc.point))
    assert control.gain.point == control.normalised_gain == 0
    assert ranking.label_curve[-1].auroc == good.auroc.point
    assert ranking.classes == ("no", "yes")


def test_three_classes_are_ranked_too():
    sights, labels, groups, sites = make_sights()
    labels[::4] = "may"
    ranking = rank(sights, "none", labels, groups, sites, SETTINGS)
    assert ranking.classes == ("may", "no", "yes")
    assert all(0 <= one.auroc.point <= 1 for one in ranking.standings)


def test_what_is_undefined_is_null_and_the_order_stands():
    sights, _, groups, _ = make_sights()
    alone = np.where(groups == groups[0], "yes", "no")  # nobody else has it
    ranking = rank(sights, "none", alone, groups, np.full(60, ""), SETTINGS)
    document = json.loads(json.dumps(ranking.to_document(), allow_nan=False))
    assert [one["weights"] for one in document["standings"]] == list(sights)
    assert document["standings"][0]["auroc"] == {"point": None, "low": None, "high": None}
    assert document["standings"][0]["site_distance"] is None
    assert document["label_curve"][0] == {"patients": None, "auroc": None}


def test_distance_of_sites_is_that_of_the_farthest_pair():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 3)).astype(np.float32)
    sites = np.array(["A", "B", "C", "D"] * 10)
    features[sites == "C"] += 2
    sites[sites == "D"] = ""  # unknown is no site
    sites[0] = "single"
    found, which = site_distance(features, sites)
    assert "C" in which
    expected = mmd2(*(torch.as_tensor(features[sites == name]) for name in which), unbiased=True)
    assert found == pytest.approx(float(expected))
    alone, none = site_distance(features, np.full(40, "A"))
    assert math.isnan(alone)
    assert none == ()
