import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medvit.config import EvaluationConfig
from medvit.evaluation.attributes import with_attributes
from medvit.evaluation.bootstrap import exact_end
from medvit.evaluation.fairness import assess_fairness
from medvit.evaluation.groups import unseen
from medvit.evaluation.predictions import check_predictions

QUICK = EvaluationConfig(bootstrap=100)


cases = st.lists(
    st.tuples(st.booleans(), st.floats(0, 1).map(lambda p: round(p, 2)), st.sampled_from("abc"), st.integers(0, 9)),
    min_size=6,
    max_size=80,
)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_every_figure_of_a_group_equals_scikit_learn(drawn):
    columns = pd.DataFrame(drawn, columns=["truth", "p_1", "site", "patient_id"])
    frame = check_predictions(columns.assign(label=columns["truth"].astype(int), threshold=0.5))
    (table,) = assess_fairness(frame, "site", QUICK)
    for group in (*table.groups, table.overall):
        rows = columns if group is table.overall else columns[columns["site"] == group.name]
        truth, called = rows["truth"], rows["p_1"] >= 0.5
        nan = {"zero_division": np.nan}
        expected = {
            "prevalence": truth.mean(),
            "selection_rate": called.mean(),
            "tpr": sk.recall_score(truth, called, **nan),
            "fpr": 1 - sk.recall_score(~truth, ~called, **nan),
            "ppv": sk.precision_score(truth, called, **nan),
            "npv": sk.precision_score(~truth, ~called, **nan),
            "auroc": sk.roc_auc_score(truth, rows["p_1"]) if truth.nunique() == 2 else np.nan,
        }
        for name, value in expected.items():
            interval = getattr(group, name)
            assert interval.point == pytest.approx(value, abs=1e-12, nan_ok=True)
            assert np.isnan(interval.low) or interval.low <= interval.point <= interval.high


def test_a_rate_of_an_empty_cell_is_undefined():
    frame = pd.DataFrame({"label": list("0011"), "p_1": [0.1, 0.2, 0.3, 0.4], "threshold": 0.9, "site": list("AABB")})
    (table,) = assess_fairness(check_predictions(frame), "site", QUICK)
    first, second = table.groups
    assert math.isnan(first.tpr.point)
    assert math.isnan(second.fpr.point)
    assert [math.isnan(group.ppv.point) for group in table.groups] == [True, True]  # nobody was called
    assert [group.npv.point for group in table.groups] == [1, 0]


def test_studies_are_counted_where_they_are_told_apart(cohort):
    frame = cohort()
    frame["study_uid"] = [f"1.2.{i // 2}" for i in range(len(frame))]
    (table,) = assess_fairness(check_predictions(frame), "site", QUICK)
    assert table.overall.studies == 150
    assert assess_fairness(check_predictions(cohort()), "site", QUICK)[0].overall.studies is None


def test_what_resampling_cannot_see():
    assert unseen(0.5, 20, 0.95) == 0
    assert unseen(1.0, 20, 0.95) == exact_end(20, 0.95)
    assert unseen(0.5, 1, 0.95) == exact_end(1, 0.95)  # one patient with two cases
    assert unseen(np.nan, 0, 0.95) == 0
    assert unseen(1.0, None, 0.95) == 0


def test_refused_and_unknown_cases_are_counted_by_group(cohort):
    frame = cohort().assign(flags="")
    frame.loc[frame.index[:9], ["p_none", "p_bleed", "flags"]] = [None, None, "NOT_FOR_MODEL"]
    frame.loc[frame.index[9:16], "flags"] = "LOSSY OUT_OF_DISTRIBUTION"
    frame["thickness"] = ["5.000000"] * 9 + ["5"] * (len(frame) - 10) + ["2.5"]
    frame["hall"] = ["closed"] * 9 + ["open"] * (len(frame) - 9)
    checked, _, _ = with_attributes(check_predictions(frame), QUICK)
    for attribute in ("site", "site_by_sex", "age_band"):
        (table,) = assess_fairness(checked, attribute, QUICK)
        assert table.overall.refused == sum(group.refused for group in table.groups) == 9
        assert table.overall.unknown == sum(group.unknown for group in table.groups) == 7
    (table,) = assess_fairness(checked, "thickness", QUICK)
    assert [(group.name, group.refused) for group in table.groups] == [("2.5", 0), ("5", 9)]  # however it is spelled
    (table,) = assess_fairness(checked, "hall", QUICK)
    shut = table.groups[0]
    assert (shut.name, shut.cases, shut.refused) == ("closed", 0, 9)  # nobody there was served at all
    assert math.isnan(shut.tpr.point)
    assert table.verdict == "cannot tell"
