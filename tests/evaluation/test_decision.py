import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from medvit.config import EvaluationConfig, PricesConfig
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.decision import Latency, cost_of_ownership, measure_gain
from medvit.evaluation.latency import TIMED, measure_latency
from medvit.evaluation.metrics import weighted_auroc
from medvit.evaluation.predictions import check_predictions
from medvit.records import UsageError
from tests.evaluation.models import judged_cases, small_model

SETTINGS = EvaluationConfig(bootstrap=200)
ONE_HOUR = Latency(median=3600.0, slowest=7200.0, cases=3, slices=5.0, device="cpu", threads=2)


def blurred(frame: pd.DataFrame, share: float, seed: int = 5) -> pd.DataFrame:
    """The same cases scored with noise."""
    noise = np.random.default_rng(seed).random(len(frame))
    score = (1 - share) * frame["p_bleed"] + share * noise
    return frame.assign(p_bleed=score, p_none=1 - score)


def test_gain_is_the_difference_of_both_on_the_same_cases(cohort):
    frame = cohort(300)
    other = blurred(frame, 0.6).sample(frac=1, random_state=1)  # the order of rows means nothing
    gain = measure_gain(check_predictions(frame), check_predictions(other), "readers", SETTINGS)
    truth = frame["label"] == "bleed"
    expected = sklearn.metrics.roc_auc_score(truth, frame["p_bleed"]) - sklearn.metrics.roc_auc_score(
        truth, other.sort_index()["p_bleed"]
    )
    assert gain.auroc.point == pytest.approx(expected, abs=1e-12)
    assert gain.auroc.low > 0
    assert (gain.baseline, gain.cases, gain.patients) == ("readers", 300, frame["patient_id"].nunique())


def test_pairing_makes_a_small_gain_visible(cohort):
    """Two independent intervals would overlap: what both find hard is the same."""
    frame = check_predictions(cohort(300))
    gain = measure_gain(frame, check_predictions(blurred(cohort(300), 0.3)), "readers", SETTINGS)
    assert gain.auroc.half_width < 0.04


def test_cases_that_no_id_names_are_never_paired_by_their_row(cohort):
    """A table whose rows were shuffled would pass for the same cases, and its intervals for paired ones."""
    frame, other = cohort(300), blurred(cohort(300), 0.6)
    whole = measure_gain(check_predictions(frame), check_predictions(other), "readers", SETTINGS)
    few = [one.assign(case_id=["", "", "", "", *one["case_id"][4:]]) for one in (frame, other)]
    gain = measure_gain(*map(check_predictions, few), "readers", SETTINGS)
    assert (whole.cases, gain.cases) == (300, 296)
    nameless = [check_predictions(one.drop(columns="case_id")) for one in (frame, other)]
    with pytest.raises(UsageError, match="not paired by their number"):
        measure_gain(*nameless, "readers", SETTINGS)


def test_a_method_gains_nothing_over_itself(cohort):
    frame = check_predictions(cohort(100))
    gain = measure_gain(frame, frame, "itself", SETTINGS)
    assert gain.auroc.point == gain.sensitivity.point == gain.specificity.point == 0


def test_recall_of_each_class_is_compared(cohort):
    """Of two classes these are sensitivity and specificity; of more, means over classes would hide one that is lost."""
    frame, other = check_predictions(cohort(300)), check_predictions(blurred(cohort(300), 0.6))
    gain = measure_gain(frame, other, "readers", SETTINGS)
    assert gain.recall == {"none": gain.specificity, "bleed": gain.sensitivity}
    for name, change in gain.recall.items():
        of_class = [one[one["label"] == name] for one in (frame, other)]
        shares = [(one["predicted"] == name).mean() for one in of_class]
        assert change.point == pytest.approx(shares[0] - shares[1])


def test_a_class_that_is_wholly_lost_has_an_exact_end(cohort):
    frame = cohort(40)
    right = check_predictions(frame.assign(predicted=frame["label"]))
    blind = check_predictions(frame.assign(predicted="none"))
    lost = measure_gain(blind, right, "readers", SETTINGS).recall["bleed"]
    ill = frame["patient_id"][frame["label"] == "bleed"].nunique()
    assert (lost.point, lost.low) == (-1, -1)
    assert lost.high == pytest.approx(-1 + 2 * (1 - 0.025 ** (1 / ill)))


def test_only_shared_cases_count(cohort):
    frame = check_predictions(cohort(200))
    other = blurred(cohort(200), 0.5).iloc[50:]
    elsewhere = other.iloc[:7].assign(case_id=[f"other{k}" for k in range(7)])
    gain = measure_gain(frame, check_predictions(pd.concat([other, elsewhere])), "readers", SETTINGS)
    assert gain.cases == 150
    assert "on the 150 cases that both" in gain.notes[-1]
    assert "Left out are 50 of the model's 200 and 7 of the baseline's 157" in gain.notes[-1]


def test_what_the_table_of_the_baseline_assumed_is_told(cohort):
    """Without a threshold of its own it is called at 0.5, and the model at its own."""
    tuned = check_predictions(cohort(60))
    bare = check_predictions(cohort(60)[["case_id", "patient_id", "label", "p_none", "p_bleed"]])
    (told,) = measure_gain(tuned, bare, "readers", SETTINGS).notes
    assert told.startswith("Baseline readers: No threshold was given")
    assert "0.5" in told
    assert not measure_gain(tuned, tuned, "itself", SETTINGS).notes


def test_few_findings_give_a_wide_interval_however_many_patients(cohort):
    """A figure rests on the patients with the finding: with four of them Student's tails are far out."""
    few = cohort(300)
    ill = few.index[few["label"] == "bleed"][4:]
    few.loc[ill, "label"] = "none"
    frame, other = check_predictions(few), check_predictions(blurred(few, 0.5))
    gain = measure_gain(frame, other, "readers", SETTINGS)
    truth = (few["label"] == "bleed").to_numpy()
    bootstrap = PatientBootstrap(frame["patient_id"].to_numpy(), SETTINGS.bootstrap)
    scores = [one["p_bleed"].to_numpy() for one in (frame, other)]
    naive = bootstrap.interval(
        lambda weights: weighted_auroc(truth, scores[0], weights) - weighted_auroc(truth, scores[1], weights)
    )
    assert gain.auroc.point == pytest.approx(naive.point)
    assert gain.auroc.half_width > naive.half_width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.assign(case_id=[f"other{k}" for k in range(len(frame))]), "no case_id"),
        (lambda frame: frame.assign(label=frame["label"].iloc[::-1].to_numpy()), "another label"),
        (lambda frame: frame.rename(columns={"p_bleed": "p_blood"}).replace({"bleed": "blood"}), "classes"),
    ],
)
def test_what_cannot_be_compared_is_told(cohort, change, message):
    frame = check_predictions(cohort(60))
    with pytest.raises(UsageError, match=message):
        measure_gain(frame, check_predictions(change(cohort(60))), "readers", SETTINGS)


def test_latency_is_measured_on_cases_one_at_a_time():
    judged = judged_cases(small_model(), TIMED + 4)
    found = measure_latency(judged)
    assert 0 < found.median <= found.slowest
    assert (found.cases, found.slices, found.device) == (TIMED, 4.0, "cpu")
    with pytest.raises(ValueError, match="none"):
        measure_latency([])


def test_cost_is_all_of_it_and_not_only_that_of_a_study():
    prices = PricesConfig(
        years=2,
        studies_per_year=100,
        label_case=3,
        machine_hour=2,
        updates_per_year=1,
        service_year=50,
        staff_hours_year=10,
        staff_hour=40,
    )
    cost = cost_of_ownership(prices, ONE_HOUR, labelled_cases=20, training_hours=5)
    assert cost.training == 20 * 3 + 5 * 2 + 2 * 5 * 2
    assert cost.operation == 200 * 2 + 2 * 50  # an hour of the machine for each of 200 studies
    assert cost.maintenance == 2 * 10 * 40
    assert cost.total == cost.training + cost.operation + cost.maintenance
    assert cost.per_study == pytest.approx(cost.total / 200)
