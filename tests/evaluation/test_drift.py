import numpy as np
import pytest

from medvit.evaluation.drift import FEWEST, drift_test, gaussian_kernel
from medvit.models.reference import SAMPLED, one_per_patient


def test_it_is_the_discrepancy_of_the_definition():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(12, 3)), rng.normal(1, 1, size=(15, 3))
    scale = np.concatenate([one, other]).std(axis=0)
    a, b = one / scale, other / scale
    everything = np.concatenate([a, b])
    distances = [np.sum((everything[i] - everything[j]) ** 2) for i in range(27) for j in range(i)]
    width = np.median(distances)

    def mean(first, second):
        return np.mean([np.exp(-np.sum((x - y) ** 2) / (2 * width)) for x in first for y in second])

    found = drift_test(one, other)
    assert found.discrepancy == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert (found.patients, found.reference) == (15, 12)


def test_p_is_uniform_without_a_shift_whatever_the_sizes():
    rng = np.random.default_rng(1)
    p = [drift_test(rng.normal(size=(40, 5)), rng.normal(size=(15, 5)), draws=199).p for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.09
    assert 0.4 < np.mean(p) < 0.6


def test_it_does_not_ring_with_many_features_and_few_patients():
    rng = np.random.default_rng(1)
    p = [drift_test(rng.normal(size=(10, 768)), rng.normal(size=(10, 768)), draws=99).p for _ in range(200)]
    assert np.mean(np.array(p) <= 0.05) < 0.12


def test_a_shift_of_everybody_is_found_though_nobody_is_an_outlier():
    rng = np.random.default_rng(2)
    found = drift_test(rng.normal(size=(200, 20)), rng.normal(0.5, 1, size=(40, 20)))
    assert found.p < 0.01


def test_a_feature_in_large_units_does_not_drown_the_others():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(100, 4)), rng.normal(size=(60, 4))
    other[:, 0] += 1.5
    units = np.array([1, 1e4, 1e4, 1e4])
    assert drift_test(one * units, other * units).p < 0.01


def test_few_patients_are_not_tested():
    rng = np.random.default_rng(4)
    assert drift_test(rng.normal(size=(50, 3)), rng.normal(size=(FEWEST - 1, 3))) is None
    assert drift_test(rng.normal(size=(0, 0)), rng.normal(size=(50, 3))) is None


def test_features_of_another_model_are_refused():
    with pytest.raises(ValueError, match="same model"):
        drift_test(np.zeros((20, 3)), np.zeros((20, 4)))


def test_cases_that_are_all_the_same_are_no_shift():
    assert (gaussian_kernel(np.ones((5, 2))) == 1).all()
    assert drift_test(np.ones((20, 3)), np.ones((20, 3))).p == 1


def test_each_patient_counts_once():
    patients = ["a", "b", "a", "c", "b"]
    features = np.arange(5.0)[:, None]
    assert sorted(one_per_patient(features, patients)[:, 0]) == [0, 1, 3]
    assert len(one_per_patient(np.zeros((SAMPLED + 50, 2)), [str(k) for k in range(SAMPLED + 50)])) == SAMPLED
