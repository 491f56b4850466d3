import math

import numpy as np
import pytest
from scipy import stats

from medvit.evaluation.permutation import no_gap_p


def simulated(seed, *, patients=120, tpr=(0.8, 0.8, 0.8), prevalence=(0.5, 0.5, 0.5), cases=2, alike=0.0):
    """Truth, called, groups, patients; `alike` of the patients are called the same in all their cases."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), cases)
    site = patient % 3
    truth = rng.random(len(patient)) < np.array(prevalence)[site]
    luck = np.where((rng.random(patients) < alike)[patient], rng.random(patients)[patient], rng.random(len(patient)))
    return truth, luck < np.where(truth, np.array(tpr)[site], 0.2), site, patient


def alarms(cohorts, **options):
    return sum(no_gap_p(*simulated(seed, **options), draws=100) < 0.05 for seed in range(cohorts))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alike": 0.9, "cases": 4},  # cases exchanged one by one would alarm in every other cohort
        {"prevalence": (0.1, 0.5, 0.9)},  # so would patients, whatever their cases
    ],
)
def test_equal_rates_alarm_in_one_cohort_of_twenty(options):
    assert alarms(200, **options) <= stats.binom.ppf(0.999, 200, 0.05)


def test_a_site_that_is_served_worse_is_found():
    assert alarms(20, tpr=(0.9, 0.9, 0.5), patients=300) == 20


def test_two_groups_of_single_cases_agree_with_fisher():
    truth = np.ones(60, bool)
    groups, called = np.repeat(["a", "b"], 30), np.r_[np.arange(30) < 27, np.arange(30) < 19]
    p = no_gap_p(truth, called, groups, np.arange(60), draws=20_000)
    assert p == pytest.approx(stats.fisher_exact([[27, 3], [19, 11]]).pvalue, abs=0.005)


def test_one_group_has_no_gap_to_test():
    assert math.isnan(no_gap_p(np.ones(4, bool), np.ones(4, bool), np.zeros(4), np.arange(4)))


def test_a_rate_that_nobody_has_is_no_evidence():
    truth = np.zeros(20, bool)
    assert no_gap_p(truth, truth, np.arange(20) % 2, np.arange(20), draws=50) == 1.0


def test_chunks_of_exchanges_do_not_change_what_is_found(monkeypatch):
    one = no_gap_p(*simulated(3), draws=200)
    monkeypatch.setattr("medvit.evaluation.permutation.CHUNK_CELLS", 1)
    assert no_gap_p(*simulated(3), draws=200) == pytest.approx(one, abs=0.15)
