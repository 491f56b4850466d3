import math
from dataclasses import astuple, replace

import fairlearn.metrics
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.config import EvaluationConfig
from medvit.evaluation.fairness import adjusted, assess_fairness, equalized_odds_difference
from medvit.evaluation.groups import MEASURES
from medvit.evaluation.predictions import check_predictions

QUICK = EvaluationConfig(bootstrap=200)
rows = st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abc")), min_size=4, max_size=60)


def no_cell_is_empty(cases):
    return {(label, group) for label, _, group in cases} == {(y, g) for y in (0, 1) for _, _, g in cases}


def find(table, name):
    return next(group for group in table.groups if group.name == name)


@given(rows.filter(no_cell_is_empty), st.sampled_from(["worst_case", "mean"]))
def test_equalized_odds_difference_equals_fairlearn(cases, method):
    truth, called, groups = (np.array(column) for column in zip(*cases, strict=True))
    if len(set(groups)) < 2:
        assert math.isnan(equalized_odds_difference(truth, called, groups, method))
        return
    expected = fairlearn.metrics.equalized_odds_difference(truth, called, sensitive_features=groups, agg=method)
    assert equalized_odds_difference(truth, called, groups, method) == pytest.approx(expected, abs=1e-12)


def test_rates_equal_fairlearn(cohort):
    frame = check_predictions(cohort())
    (table,) = assess_fairness(frame, "site", QUICK)
    rates = {
        "tpr": fairlearn.metrics.true_positive_rate,
        "fpr": fairlearn.metrics.false_positive_rate,
        "prevalence": lambda truth, _: truth.mean(),
    }
    truth, called = frame["label"] == "bleed", frame["predicted"] == "bleed"
    expected = fairlearn.metrics.MetricFrame(
        metrics=rates, y_true=truth, y_pred=called, sensitive_features=frame["site"]
    ).by_group
    for group in table.groups:
        for name in rates:
            assert getattr(group, name).point == pytest.approx(expected.loc[group.name, name], abs=1e-12)
    odds = fairlearn.metrics.equalized_odds_difference(truth, called, sensitive_features=frame["site"])
    assert table.equalized_odds.point == pytest.approx(odds, abs=1e-12)
    assert table.equalized_odds.point == max(table.tpr_gap.point, table.fpr_gap.point)


def test_rate_of_an_empty_cell_is_undefined_not_zero(cohort):
    frame = cohort()
    frame = frame[(frame["site"] != "West") | (frame["label"] == "none")]
    (table,) = assess_fairness(check_predictions(frame), "site", QUICK)
    west = find(table, "West")
    assert west.positives == 0
    assert math.isnan(west.tpr.point)
    assert math.isnan(west.auroc.point)
    assert west.small
    # the others are compared all the same, but nobody can say "met" for West
    assert not math.isnan(table.equalized_odds.point)
    assert table.verdict != "met"


def test_missing_attribute_has_a_row_and_no_part_in_the_gap(cohort):
    frame = cohort()
    frame.loc[frame["sex"] == "", "p_bleed"] = 0.0
    frame["p_none"] = 1 - frame["p_bleed"]
    (table,) = assess_fairness(check_predictions(frame), "sex", QUICK)
    assert [group.name for group in table.groups] == ["F", "M", "not given"]
    assert find(table, "not given").tpr.point == 0
    named = [find(table, name).tpr.point for name in "FM"]
    assert table.tpr_gap.point == pytest.approx(abs(named[0] - named[1]))


def test_counts_are_of_patients_and_cases(cohort):
    frame = check_predictions(cohort())
    (table,) = assess_fairness(frame, "site", QUICK)
    for group in table.groups:
        rows = frame[frame["site"] == group.name]
        assert (group.patients, group.cases) == (rows["patient_id"].nunique(), len(rows))
        assert group.positives + group.negatives == group.cases
    assert table.overall.cases == len(frame)


def test_fewer_than_two_groups_cannot_be_compared(cohort):
    (table,) = assess_fairness(check_predictions(cohort(sites=("Only",))), "site", QUICK)
    assert math.isnan(table.equalized_odds.point)
    assert table.verdict == "cannot tell"
    assert table.auroc_alone.point == 0.5
    frame = check_predictions(cohort().assign(site=""))
    assert assess_fairness(frame, "site", QUICK)[0].verdict == "cannot tell"


def make_rates(cells, per_patient=1):
    """Cases from {group: (positives, called of them, negatives, called of them)}."""
    table = []
    for group, (positives, hits, negatives, alarms) in cells.items():
        table += [("1", int(i < hits), group) for i in range(positives)]
        table += [("0", int(i < alarms), group) for i in range(negatives)]
    frame = pd.DataFrame(table, columns=["label", "p_1", "site"])
    return check_predictions(frame.assign(patient_id=np.arange(len(frame)) // per_patient))


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        ({"A": (900, 810, 900, 90), "B": (900, 805, 900, 95)}, "met"),
        ({"A": (200, 180, 200, 20), "B": (200, 100, 200, 20)}, "not met"),
        ({"A": (30, 27, 30, 3), "B": (30, 24, 30, 3)}, "cannot tell"),
        # all right in twelve patients proves little
        ({"A": (12, 12, 12, 0), "B": (12, 12, 12, 0)}, "cannot tell"),
        # one missed patient convicts nobody
        ({"A": (900, 810, 900, 90), "B": (900, 805, 900, 95), "C": (1, 0, 40, 4)}, "cannot tell"),
        # a rate that nobody knows is not met
        ({"A": (900, 810, 900, 90), "B": (900, 805, 900, 95), "C": (0, 0, 900, 90)}, "cannot tell"),
        # few patients do not hide a gap between the others
        ({"A": (200, 180, 200, 20), "B": (200, 100, 200, 20), "C": (1, 0, 40, 4)}, "not met"),
    ],
)
def test_verdict(cells, verdict):
    (table,) = assess_fairness(make_rates(cells), "site", QUICK)
    assert table.verdict == verdict


def test_many_equal_sites_are_not_convicted_by_chance():
    rng = np.random.default_rng(0)
    for _ in range(10):
        cells = {f"S{i}": (25, rng.binomial(25, 0.8), 25, rng.binomial(25, 0.2)) for i in range(10)}
        assert assess_fairness(make_rates(cells), "site", QUICK)[0].verdict == "cannot tell"


def test_a_group_may_be_called_all(cohort):
    (table,) = assess_fairness(check_predictions(cohort(sites=("all", "B"))), "site", QUICK)
    assert [group.name for group in table.groups] == ["B", "all"]
    assert find(table, "all").cases < table.overall.cases == 300


def test_order_of_cases_does_not_matter(cohort):
    frame = cohort()
    one, other = (
        assess_fairness(check_predictions(f), "site", QUICK)[0] for f in (frame, frame.sample(frac=1, random_state=1))
    )
    assert one.no_gap_p == other.no_gap_p
    for group, same in zip(one.groups, other.groups, strict=True):
        assert (group.name, group.patients, group.cases) == (same.name, same.patients, same.cases)
        for figure in MEASURES:
            assert astuple(getattr(group, figure)) == pytest.approx(astuple(getattr(same, figure)), abs=1e-12)
    assert astuple(one.equalized_odds) == pytest.approx(astuple(other.equalized_odds), abs=1e-12)


def test_misaligned_attributes_are_refused():
    with pytest.raises(ValueError, match="one length"):
        equalized_odds_difference([0, 1, 1], [0, 1, 1], ["a", "b"])


def test_attribute_alone_shows_confounding_and_not_noise(cohort):
    frame = cohort(600)
    frame.loc[frame["site"] == "North", "label"] = "bleed"
    (table,) = assess_fairness(check_predictions(frame), "site", QUICK)
    assert table.auroc_alone.low > 0.6
    rng = np.random.default_rng(1)
    (table,) = assess_fairness(check_predictions(frame.assign(coin=rng.choice(["a", "b"], 600))), "coin", QUICK)
    assert table.auroc_alone.low < 0.5 < table.auroc_alone.high + 0.05


def test_three_classes_have_a_table_each(three_classes):
    tables = assess_fairness(check_predictions(three_classes()), "site", QUICK)
    assert [table.positive for table in tables] == ["none", "benign", "malign"]


def test_signed_differences_are_those_of_the_groups(cohort):
    (table,) = assess_fairness(check_predictions(cohort()), "site", QUICK)
    assert len(table.differences) == 3 * len(MEASURES)
    for one in table.differences:
        first, second = (getattr(find(table, name), one.figure) for name in (one.first, one.second))
        assert one.difference.point == pytest.approx(first.point - second.point, abs=1e-12)
        assert one.difference.low <= one.difference.point <= one.difference.high


@given(rows.filter(no_cell_is_empty))
@settings(max_examples=15, deadline=None)
def test_demographic_parity_and_equal_opportunity_equal_fairlearn(cases):
    truth, called, groups = (np.array(column) for column in zip(*cases, strict=True))
    if len(set(groups)) < 2:
        return
    frame = pd.DataFrame({"label": truth.astype(int).astype(str), "p_1": called.astype(float), "site": groups})
    (table,) = assess_fairness(check_predictions(frame), "site", EvaluationConfig(bootstrap=100))
    parity = fairlearn.metrics.demographic_parity_difference(truth, called, sensitive_features=groups)
    opportunity = fairlearn.metrics.equal_opportunity_difference(truth, called, sensitive_features=groups)
    assert table.selection_gap.point == pytest.approx(parity, abs=1e-12)
    assert table.tpr_gap.point == pytest.approx(opportunity, abs=1e-12)


def test_p_values_are_adjusted_for_the_number_of_tables(cohort):
    frame = check_predictions(cohort())
    (one,) = assess_fairness(frame, "site", QUICK)
    tables = [replace(one, no_gap_p=p) for p in (0.04, 0.01, math.nan, 0.03)]
    found = [table.no_gap_p_adjusted for table in adjusted(tables)]
    assert found[:2] == pytest.approx([0.06, 0.03])  # Holm by hand: 3 * 0.01; 2 * 0.03; and never below the one before
    assert math.isnan(found[2])
    assert found[3] == pytest.approx(0.06)
