"""Curves of a model that is known: its logit is linear in the mean HU, so that drift and attacks can be computed."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from medvit.config import EvaluationConfig, ModelConfig, RobustnessConfig, TtaConfig
from medvit.evaluation import robustness
from medvit.evaluation.attacks import ATTACKS
from medvit.evaluation.curves import Curve, Robustness
from medvit.evaluation.metrics import auroc, auroc_within
from medvit.evaluation.physics import CORRUPTIONS
from medvit.evaluation.robustness import STRESSES, in_order, measure_robustness
from medvit.evaluation.robustness_chart import draw_robustness
from medvit.inference import Encoder, Judged, Model
from medvit.models.bundle_info import BundleInfo, TrainingRange
from medvit.models.classifier import CtClassifier
from medvit.records import Case, ClaheSettings, Prediction, Preprocessing, UsageError

SIZE = 16
PREPROCESSING = Preprocessing(windows=((0.0, 2000.0),), size=SIZE, predict_slices=4)
SLOPE = 0.03
"""Of the logit, per HU of the mean."""


class MeanHu(nn.Module):
    """A backbone that sees nothing but the mean."""

    size, patch, width = SIZE, 1, 1

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return slices.mean(dim=(1, 2, 3))[:, None]


def known(offset: float = 0.0, dropout: float = 0.0, **settings) -> Model:
    """p("bleed") = sigmoid(SLOPE (mean HU - offset))."""
    architecture = ModelConfig(name="mean", weights="none", pooling="mean", dropout=dropout)
    classifier = CtClassifier(MeanHu(), architecture, 2)
    classifier.norm = nn.Identity()
    head = classifier.head[1]
    with torch.no_grad():  # the window maps HU to HU / 2000 + 0.5
        head.weight.copy_(torch.tensor([[0.0], [2000 * SLOPE]]))
        head.bias.copy_(torch.tensor([0.0, -1000 * SLOPE - offset * SLOPE]))
    info = BundleInfo(
        architecture=architecture,
        preprocessing=PREPROCESSING.model_copy(update=settings),
        mean=(0.0,),
        std=(1.0,),
        classes=("none", "bleed"),
        threshold=0.5,
    )
    return Model(Encoder(classifier, info.preprocessing, info.mean, info.std), info)


def cohort(count: int = 16, slices: int = 3, seed: int = 0, model: Model | None = None, **about) -> list[Judged]:
    """Bleeds are 20 HU denser, give or take 20; two cases of each patient."""
    rng, model = np.random.default_rng(seed), model or known()
    found = []
    for number in range(count):
        label = ("none", "bleed")[number % 2]
        hu = rng.normal(20 * (number % 2) - 10 + rng.normal(0, 20), 5, (slices, SIZE, SIZE)).astype(np.int16)
        patient = f"patient{number // 4}-{number % 2}"
        case = Case(case_id=f"c{number}", patient_id=patient, group=patient, root="", files=(), label=label, **about)
        prediction = model.prediction(case, *model.encoder.study(hu))
        found.append(Judged(model, case, prediction, lambda _case, hu=hu: hu))
    return found


def settings(minutes: float = 5.0, cases: int = 60) -> EvaluationConfig:
    return EvaluationConfig(bootstrap=100, robustness=RobustnessConfig(minutes=minutes, cases=cases))


def means(judged: list[Judged]) -> np.ndarray:
    return np.array([one.load(one.case).mean() for one in judged])


def truth(judged: list[Judged]) -> np.ndarray:
    return np.array([one.case.label == "bleed" for one in judged])


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    return cohort()


@pytest.fixture(scope="module")
def measured(judged) -> Robustness:
    return measure_robustness(judged, settings())


@pytest.fixture
def few(monkeypatch) -> list[str]:
    """Only these, where it does not matter which."""
    names = ["dose", "thicker", "white", "FGSM", "PGD"]
    monkeypatch.setattr(robustness, "STRESSES", {name: STRESSES[name] for name in names})
    return names


def levels_of(measured: Robustness, names: list[str]) -> list[tuple]:
    return [one.levels for one in measured.curves if one.name in names]


def curve(measured: Robustness, name: str) -> Curve:
    return next(one for one in measured.curves if one.name == name)


def test_every_stress_has_a_curve_of_all_cases(measured):
    assert [one.name for one in measured.curves] == [*CORRUPTIONS, *ATTACKS] == list(STRESSES)
    assert {(one.cases, one.patients) for one in measured.curves} == {(16, 8)}
    for one in measured.curves:
        assert tuple(level.severity for level in one.levels) == STRESSES[one.name].severities
    assert "16 of 16 labelled cases (at most 60)" in measured.extent
    assert "at most 5 minutes" in measured.extent


def test_clean_is_what_the_model_predicts(judged, measured):
    scores = [one.model.predict_slices(one.load(one.case), one.case).probabilities["bleed"] for one in judged]
    expected = auroc(truth(judged), scores)
    assert 0.6 < expected < 0.95
    for one in measured.curves:
        assert one.clean.point == pytest.approx(expected, abs=1e-9)
        assert one.clean.low < expected < one.clean.high


def test_drift_moves_the_probability_by_as_much_as_the_logit(judged, measured):
    clean = SLOPE * means(judged)
    for level in curve(measured, "drift").levels:
        moved = sigmoid(clean + SLOPE * level.severity)
        assert level.moved == pytest.approx(np.abs(moved - sigmoid(clean)).mean(), abs=1e-4)
        assert level.flipped == ((moved >= 0.5) != (clean >= 0)).mean()
        assert level.change.point == 0  # all move alike: their order stays


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_move_every_case_the_wrong_way(judged, measured, name):
    bleeds = truth(judged)
    for level in curve(measured, name).levels:
        attacked = means(judged) + level.severity * np.where(bleeds, -1, 1)
        expected = auroc(bleeds, attacked)
        assert level.auroc == pytest.approx(expected, abs=0.02)  # PGD may not reach every corner
        assert level.change.point == pytest.approx(expected - auroc(bleeds, means(judged)), abs=0.02)
        assert level.change.low <= level.change.point <= level.change.high
    assert curve(measured, name).levels[-1].change.high < 0


def test_a_mean_does_not_mind_a_softer_kernel(measured):
    for level in curve(measured, "softer").levels:
        assert level.moved < 0.02
        assert level.change.point == pytest.approx(0, abs=0.04)


def test_pairs_are_of_one_fold(few):
    one, other = cohort(12, seed=1), cohort(12, seed=2, model=known(offset=200.0))
    both = [*one, *(_in_fold_1(two) for two in other)]
    scores = [two.model.predict_slices(two.load(two.case), two.case).probabilities["bleed"] for two in both]
    expected = auroc_within(truth(both), scores, np.repeat([0, 1], 12))
    assert auroc(truth(both), scores) != pytest.approx(expected, abs=0.05)
    (dose, *_) = measure_robustness(both, settings()).curves
    assert dose.clean.point == pytest.approx(expected, abs=1e-9)


def _renamed(case: Case) -> Case:
    return dataclasses.replace(case, case_id=f"{case.case_id} b", patient_id=f"{case.patient_id} b")


def test_the_same_seed_gives_the_same_figures(judged, measured, few):
    again = measure_robustness(list(judged), settings())
    assert levels_of(again, few) == levels_of(measured, few)


def test_noise_and_attack_are_judged_in_evaluation_mode(measured, few):
    learning = known(dropout=0.5)
    learning.encoder.classifier.train()
    found = measure_robustness(cohort(model=learning), settings())
    assert levels_of(found, few) == levels_of(measured, few)
    assert learning.encoder.classifier.training
    assert all(parameter.grad is None for parameter in learning.encoder.classifier.parameters())


def test_test_time_augmentation_is_left_out(measured, few):
    augmented = known().with_views(TtaConfig(views=3, scale=(0.5, 1.0)))
    found = measure_robustness(cohort(model=augmented), settings())
    assert levels_of(found, few) == levels_of(measured, few)


# ---- what is not measured -------------------------------------------------------------------------------------------


def test_single_slices_cannot_be_thicker(few):
    found = measure_robustness(cohort(slices=1), settings())
    assert [(one.name, one.reason) for one in found.not_measured] == [
        ("thicker", "a case of one slice has no neighbouring slices")
    ]
    mixed = measure_robustness([*cohort(8, slices=1), *map(_other, cohort(8, slices=3))], settings())
    assert not mixed.not_measured
    assert curve(mixed, "thicker").cases == 8
    assert curve(mixed, "dose").cases == 16


def _in_fold_1(one: Judged) -> Judged:
    return dataclasses.replace(_other(one), prediction=dataclasses.replace(one.prediction, fold=1))


def _other(one: Judged) -> Judged:
    return dataclasses.replace(one, case=_renamed(one.case))


def test_thicker_slices_are_means_of_all_slices_and_not_of_those_looked_at():
    stack = np.zeros((12, SIZE, SIZE), np.int16)
    one = dataclasses.replace(cohort(1)[0], load=lambda _: stack)
    looked_at = one.model.encoder.choose(12)
    stack[looked_at] = 90
    shown = robustness.worsened(one, stack, "thicker", 3, seed=0)
    assert shown.shape == (4, SIZE, SIZE)
    assert (shown == 30).all()


def test_clahe_cannot_be_attacked(few):
    found = measure_robustness(cohort(model=known(clahe=ClaheSettings(tiles=(2, 2)))), settings())
    assert {one.name: one.reason for one in found.not_measured} == dict.fromkeys(
        ATTACKS, "CLAHE counts pixels and has no gradient"
    )


def test_cases_that_the_model_refuses_or_that_have_no_label_are_left_out(few):
    seen = TrainingRange(body_parts=("CHEST",))
    info = known().info.model_copy(update={"training_range": seen, "refuse": ("body_part",)})
    strict = dataclasses.replace(known(), info=info)
    chest = cohort(12, model=strict, acquisition={"body_part": "CHEST"})
    head = [_other(one) for one in cohort(4, model=strict, acquisition={"body_part": "HEAD"})]
    unlabelled = [dataclasses.replace(one, case=dataclasses.replace(one.case, label=None)) for one in head]
    found = measure_robustness([*head, *unlabelled, *chest], settings())
    assert (found.available, found.refused) == (12, 4)
    assert {one.cases for one in found.curves} == {12}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that have gone by: only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(robustness.time, "monotonic", lambda: now[0])
    return now


def slow(judged: list[Judged], clock: list[float], seconds: float) -> list[Judged]:
    def load(one: Judged) -> np.ndarray:
        clock[0] += seconds
        return one.load(one.case)

    return [dataclasses.replace(one, load=lambda _, one=one: load(one)) for one in judged]


def test_as_many_cases_as_fit_into_each_share_of_the_time(clock, few):
    limits = settings(minutes=(3 + 2 + 8) * 12 / 60)
    found = measure_robustness(slow(cohort(30), clock, 1.0), limits)
    assert {one.name: one.cases for one in found.curves} == dict.fromkeys(few, 12) | {"FGSM": 24, "PGD": 30}
    assert found.seconds == clock[0] < 60 * limits.robustness.minutes
    assert "12 to 30 of 30 labelled cases (at most 60) in" in found.extent


def test_a_case_cap_leaves_time_to_the_others(clock, few):
    found = measure_robustness(slow(cohort(20), clock, 1.0), settings(minutes=10, cases=7))
    assert {one.cases for one in found.curves} == {7}
    assert found.case_cap == 7


def test_a_curve_that_does_not_fit_is_not_begun_and_says_so(clock, few, monkeypatch):
    predict = Model.predict_slices

    def slowly(self: Model, slices: np.ndarray, case: Case) -> Prediction:
        clock[0] += 10
        return predict(self, slices, case)

    judged = cohort(20)
    monkeypatch.setattr(Model, "predict_slices", slowly)
    found = measure_robustness(judged, settings(minutes=2))
    assert not found.curves
    (dose,) = (one.reason for one in found.not_measured if one.name == "dose")
    assert dose == "12 cases take about 576 s, and 120 s were left"
    assert clock[0] == 10  # what one prediction takes had to be found out
    some = measure_robustness(judged, settings(minutes=11))
    assert [one.name for one in some.curves] == ["dose"]  # the first that says something, rather than none


def test_volumes_are_looked_at_on_few_slices(few):
    limits = EvaluationConfig(bootstrap=100, robustness=RobustnessConfig(slices=2))
    judged = cohort(12, slices=9)
    seen = []
    model = dataclasses.replace(judged[0].model)
    encode = Encoder.encode

    def counting(self: Encoder, slices: np.ndarray, *views: object) -> np.ndarray:
        seen.append(len(slices))
        return encode(self, slices, *views)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "encode", counting)
        found = measure_robustness(judged, limits)
    assert set(seen) == {2}
    assert "on up to 2 slices of each" in found.extent
    assert model.preprocessing.predict_slices == 4  # the model itself is as it was


def test_nothing_to_judge(clock):
    found = measure_robustness([], settings())
    assert not found.curves
    assert {one.reason for one in found.not_measured} == {"there is no labelled case"}
    assert "none of 0" in found.extent


def test_one_class_has_no_curve(few):
    found = measure_robustness([one for one in cohort(12) if one.case.label == "bleed"], settings())
    assert not found.curves
    assert {one.reason for one in found.not_measured} == {"all cases are of one class: AUROC is undefined"}


def test_null_is_not_measured(judged):
    with pytest.raises(UsageError, match=r"evaluation\.robustness"):
        measure_robustness(judged, EvaluationConfig(robustness=None))


def test_any_beginning_of_the_order_has_both_labels_and_many_patients():
    judged = cohort(40)
    order = in_order(judged, 3)
    assert sorted(one.case.case_id for one in order) == sorted(one.case.case_id for one in judged)
    for count in (4, 10, 20):
        labels = [one.case.label for one in order[:count]]
        assert labels.count("bleed") == count / 2
        assert len({one.case.patient_id for one in order[:count]}) == count
    assert order != in_order(judged, 4)


def test_few_cases_are_of_one_fold_where_they_can_be_compared():
    both = [*cohort(20), *(_in_fold_1(one) for one in cohort(20, seed=5))]
    order = in_order(both, 0)
    assert len({one.prediction.fold for one in order[:20]}) == 1
    assert [one.case.label for one in order[:4]].count("bleed") == 2
    assert len(order) == 40


def test_the_picture_names_every_curve_its_unit_and_its_cases(measured):
    picture = draw_robustness(measured)
    assert picture.startswith("<svg")
    for one in measured.curves:
        assert f"{one.name}, {one.cases} cases" in picture
        assert one.unit in picture
    assert not re.search(r"https?:|url\((?!#)|<image", picture)
    assert draw_robustness(measured) == picture
    assert "nothing was measured" in draw_robustness(dataclasses.replace(measured, curves=()))


def test_a_report_that_draws_curves_does_not_load_torch():
    code = "import sys, medvit.evaluation.robustness_chart; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_go_into_json(measured, few):
    told = []
    measure_robustness(cohort(4), settings(), told.append)
    assert told == few
    numbers = json.loads(json.dumps(dataclasses.asdict(measured)))
    assert numbers["curves"][0]["levels"][0]["severity"] == 10
    assert numbers["minutes"] == 5
