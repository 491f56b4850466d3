import numpy as np
import pandas as pd

from medvit.config import EvaluationConfig
from medvit.evaluation.attributes import MOST_GROUPS, MOST_VALUES, age_band, with_attributes
from medvit.evaluation.fairness import assess_fairness
from medvit.evaluation.predictions import check_predictions


def test_age_bands():
    ages = pd.Series([0, 17.9, 18, 59, 60, 80, 104, 131, -1, np.nan])
    assert age_band(ages).tolist() == ["0–17", "0–17", "18–39", "40–59", "60–79", "80+", "80+", "", "", ""]


def test_site_sex_age_and_every_further_column_are_compared(cohort):
    frame = cohort(60).assign(kernel=["B30f", "B70f"] * 30, weight_kg=np.arange(60) % (MOST_VALUES + 1), constant="x")
    found, names, notes = with_attributes(check_predictions(frame), EvaluationConfig())
    assert names == ("site", "sex", "age_band", "kernel", "site_by_sex")
    assert [note.split("`")[1] for note in notes] == ["weight_kg", "constant"]
    assert set(names) <= set(found)


def test_combinations_of_two_columns_are_groups(cohort):
    frame, _, _ = with_attributes(check_predictions(cohort()), EvaluationConfig())
    (table,) = assess_fairness(frame, "site_by_sex", EvaluationConfig(bootstrap=100))
    names = [f"{site}, {sex}" for site in ("North", "South", "West") for sex in "FM"]
    assert [group.name for group in table.groups] == [*names, "not given"]
    by_hand = frame[(frame["site"] == "North") & (frame["sex"] == "F")]
    assert table.groups[0].cases == len(by_hand)
    assert table.groups[-1].cases == (frame["sex"] == "").sum()  # one of the two missing is missing


def test_chosen_columns_and_no_others(cohort):
    settings = EvaluationConfig(attributes=("sex", "vendor"), crossings=())
    _, names, notes = with_attributes(check_predictions(cohort(60).assign(kernel="B30f")), settings)
    assert names == ("sex",)
    assert notes == ["No column `vendor`: no comparison by it."]


def test_one_site_is_not_crossed(cohort):
    _, names, _ = with_attributes(check_predictions(cohort(60, sites=("Only",))), EvaluationConfig())
    assert "site_by_sex" not in names


def test_a_number_is_one_group_however_it_is_spelled(cohort):
    spelled = ["5", "5.000000", "005.0E+00", "2.5", ""] * 12
    found, names, _ = with_attributes(check_predictions(cohort(60).assign(thickness=spelled)), EvaluationConfig())
    assert "thickness" in names
    assert set(found["thickness"]) == {"5", "2.5", ""}
    mixed, _, _ = with_attributes(check_predictions(cohort(60).assign(kernel=["30", "B30f"] * 30)), EvaluationConfig())
    assert set(mixed["kernel"]) == {"30", "B30f"}


def test_of_very_many_sites_the_rare_ones_are_one_group(cohort):
    """Every pair of groups is compared: 300 institutions would be 45,000 pairs."""
    names = [f"site {number}" for number in range(100)]
    frame = cohort(600).assign(site=[names[min(row // 3, 99)] for row in range(600)])  # the last one has 303 cases
    found, chosen, notes = with_attributes(check_predictions(frame), EvaluationConfig())
    assert {"site", "site_by_sex"} <= set(chosen)
    assert found["site"].nunique() == MOST_GROUPS
    assert (found["site"] == "site 99").sum() == 303
    assert (found["site"] == "other (77)").sum() == 600 - 303 - 22 * 3
    assert "Column `site` has 100 values: all but the 23 most frequent are one group." in notes
