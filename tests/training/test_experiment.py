import json
import pickle
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax

from medvit.config import AugmentConfig, Config, InferenceConfig
from medvit.data.cache import SliceCache
from medvit.data.pipelines import window_statistics
from medvit.data.splits import Fold
from medvit.inference import load_bundle
from medvit.models.bundle import open_bundle
from medvit.records import Case, UsageError
from medvit.training import experiment as experiments
from medvit.training import runner
from medvit.training.experiment import Experiment, Judge, Result

CLASSES = ("none", "bleed")
COUNT = 10
LABELS = [CLASSES[index % 2] for index in range(COUNT)]
FOLDS = [
    Fold(np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7, 8, 9])),
    Fold(np.array([5, 6, 7]), np.array([8, 9]), np.array([0, 1, 2, 3, 4])),
]
STAGES = {
    "all": [{"epochs": 2, "lr": 1e-2}],
    "frozen": [{"epochs": 2, "lr": 1e-2, "trainable": "head"}],
}


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """One small NIfTI per case; class `bleed` is brighter; the fifth has a single slice."""
    folder = tmp_path_factory.mktemp("hospital")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        depth = 1 if index == 5 else 6
        hu = rng.normal(60 * (index % 2), 30, (32, 32, depth)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{index}.nii")
    return folder


def cases_of(root: Path, labels: list[str]) -> list[Case]:
    return [
        Case(
            case_id=f"case{index}",
            patient_id=f"patient-{index:04d}",
            group=f"patient-{index:04d}",
            root=str(root),
            files=(f"{index}.nii",),
            label=label,
            site="North",
            acquisition={"kernel": "H30s", "slice_thickness_mm": "3"},
        )
        for index, label in enumerate(labels)
    ]


class Recorder:
    """A judge that writes down what it was asked, and answers from a script."""

    def __init__(self, scores: tuple[float, ...] = ()) -> None:
        self.scores, self.points, self.temperatures = list(scores), [], []
        self.asked: list[int] = []

    def judge(self) -> Judge:
        def score(labels: np.ndarray, probabilities: np.ndarray) -> float:
            self.asked.append(len(labels))
            return self.scores.pop(0) if self.scores else 0.5

        def point(labels: np.ndarray, probabilities: np.ndarray) -> float:
            self.points.append((labels.tolist(), probabilities))
            return len(self.points) / 10

        def temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
            self.temperatures.append((labels.tolist(), probabilities))
            return 2.0

        return Judge(score, point, temperature)


def make(root: Path, folder: Path, *, mode: str = "all", labels: list[str] = LABELS, recorder=None, **training: Any):
    config = Config.model_validate(
        {
            "preprocessing": {"size": 32, "train_slices": 2, "predict_slices": 4},
            "data": {"folds": 2, "augment": None},
            "model": {
                "name": "vit_tiny_patch16_224",
                "weights": "none",
                "options": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16},
            },
            "training": {"stages": STAGES[mode], "batch_size": 2, "device": "cpu", "threads": 1, **training},
        }
    )
    slices = SliceCache(folder / "cache", config.preprocessing)
    judge = (recorder or Recorder()).judge()
    return Experiment(config, cases_of(root, labels), CLASSES, slices, folder, judge)


@pytest.fixture(scope="module", params=STAGES)
def done(request, root, tmp_path_factory) -> tuple[Experiment, Result, Recorder]:
    """Two folds and the refit, where fold 1 is best in epoch 2 and fold 2 in epoch 1."""
    recorder = Recorder((0.1, 0.9, 0.8, 0.2))
    experiment = make(root, tmp_path_factory.mktemp(request.param), mode=request.param, recorder=recorder)
    return experiment, experiment.run(FOLDS), recorder


def fold_weights(folder: Path, number: int) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"fold{number}" / "best.safetensors")


def test_each_case_is_predicted_exactly_once_out_of_fold(done):
    _, result, _ = done
    assert sorted(prediction.case_id for prediction in result.predictions) == sorted(f"case{i}" for i in range(COUNT))
    for prediction in result.predictions:
        assert int(prediction.case_id[4:]) in FOLDS[prediction.fold].test


def test_labels_stay_with_their_cases(done):
    assert all(prediction.label == LABELS[int(prediction.case_id[4:])] for prediction in done[1].predictions)


def test_epochs_are_chosen_on_validation_cases(done):
    _, result, recorder = done
    assert recorder.asked == [2, 2, 2, 2]  # two folds of two epochs, two validation cases each
    assert [history.best_epoch for history in result.histories] == [2, 1]


def test_threshold_of_a_fold_comes_from_its_validation_cases(done):
    _, result, recorder = done
    assert [labels for labels, _ in recorder.points[:2]] == [[1, 0], [0, 1]]
    assert {(p.fold, p.threshold) for p in result.predictions} == {(0, 0.1), (1, 0.2)}


def test_threshold_of_the_bundle_comes_from_out_of_fold_predictions(done):
    _, result, recorder = done
    labels, probabilities = recorder.points[2]
    assert len(recorder.points) == 3
    assert labels == [CLASSES.index(prediction.label) for prediction in result.predictions]
    np.testing.assert_allclose(probabilities[:, 1], [p.probabilities["bleed"] for p in result.predictions])
    assert open_bundle(result.bundle)[1].threshold == pytest.approx(0.3)


def test_temperature_comes_from_validation_and_that_of_the_bundle_from_out_of_fold_predictions(done):
    _, result, recorder = done
    out_of_fold = [CLASSES.index(prediction.label) for prediction in result.predictions]
    assert [labels for labels, _ in recorder.temperatures] == [[1, 0], [0, 1], out_of_fold]
    assert open_bundle(result.bundle)[1].temperature == 2.0
    for (_, before), (_, after) in zip(recorder.temperatures, recorder.points, strict=True):
        # the threshold is on the probabilities that will be reported, and these are at the temperature
        np.testing.assert_allclose(softmax(np.log(before) / 2, axis=1), after, rtol=1e-5)


def test_the_reference_of_the_bundle_is_of_all_cases_and_every_case_was_scored_unseen(done):
    experiment, result, _ = done
    model = load_bundle(result.bundle)
    features = experiment.material.pooled(model, np.arange(COUNT))
    np.testing.assert_allclose(model.reference.mean, features.mean(axis=0), atol=1e-5)
    assert model.info.ood.threshold is None  # ten cases set no threshold at 5 %
    assert all(prediction.ood_score > 0 for prediction in result.predictions)


def test_the_threshold_of_the_reference_is_of_validation_cases(root, tmp_path):
    experiment = make(root, tmp_path)
    inference = experiment.config.inference.model_copy(update={"ood_share": 0.5})
    experiment.config = experiment.config.model_copy(update={"inference": inference})
    model = experiment.run_fold(FOLDS[0], 0).model
    scores = model.reference.score(experiment.material.pooled(model, FOLDS[0].val))
    assert model.reference.threshold == pytest.approx(sorted(scores)[1], rel=1e-4)  # the 2nd of 2: (2 + 1) / 2


def test_bundle_is_a_refit_on_all_cases_for_the_median_best_epoch(done):
    experiment, result, _ = done
    rows = (experiment.folder / "checkpoints" / "refit" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == round(statistics.median([2, 1]))
    assert open_bundle(result.bundle)[1].provenance["cases"] == str(COUNT)


def test_bundle_names_no_patient_and_no_file(done):
    text = (done[1].bundle / "bundle.json").read_text()
    assert "patient-" not in text
    assert ".nii" not in text
    assert str(done[0].cases[0].root) not in text


def test_bundle_keeps_the_training_range(done):
    kept = open_bundle(done[1].bundle)[1].training_range
    assert (kept.kernels, kept.slice_thickness_mm) == (("H30s",), (3.0, 3.0))


def test_normalisation_is_the_backbones_own(done):
    info = open_bundle(done[1].bundle)[1]
    assert (info.mean, info.std) == ((0.5,) * 3, (0.5,) * 3)


def test_normalisation_of_the_config_goes_before_the_backbones(root, tmp_path):
    experiment = make(root, tmp_path)
    given = experiment.config.preprocessing.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    experiment.config = experiment.config.model_copy(update={"preprocessing": given})
    info = experiment.run_fold(FOLDS[0], 0).model.info
    assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_metrics_of_all_folds_are_in_one_table(done):
    rows = [json.loads(line) for line in (done[0].folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["fold"], row["epoch"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_same_seed_gives_the_same_predictions(done, root, tmp_path):
    experiment, result, _ = done
    mode = "frozen" if experiment.material.frozen else "all"
    again = make(root, tmp_path, mode=mode, recorder=Recorder((0.1, 0.9, 0.8, 0.2))).run(FOLDS)
    assert [p.probabilities for p in again.predictions] == [p.probabilities for p in result.predictions]


def test_resumed_experiment_predicts_the_same(done, root):
    experiment, result, _ = done
    mode = "frozen" if experiment.material.frozen else "all"
    again = make(root, experiment.folder, mode=mode)
    again.resume = True
    assert [p.probabilities for p in again.run(FOLDS).predictions] == [p.probabilities for p in result.predictions]


def test_frozen_trunk_is_computed_once_and_predicts_what_the_uncached_path_does(root, tmp_path):
    experiment = make(root, tmp_path, mode="frozen")
    predictions, model = (getattr(experiment.run_fold(FOLDS[0], 0), name) for name in ("predictions", "model"))
    assert len(list((tmp_path / "cache").glob("*.features.npy"))) == COUNT
    for prediction in predictions:
        case = experiment.cases[int(prediction.case_id[4:])]
        uncached = model.predict_slices(experiment.slices.load(case), case)
        assert uncached.probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
        np.testing.assert_allclose(uncached.slice_weights, prediction.slice_weights, atol=1e-5)


@pytest.mark.parametrize("mode", STAGES)
def test_what_loads_cases_can_be_sent_to_loader_processes(mode, root, tmp_path):
    experiment = make(root, tmp_path, mode=mode)
    model = experiment._model(FOLDS[0].train)
    dataset = experiment.material.dataset(model.encoder, FOLDS[0].train, FOLDS[0].target)
    sent = pickle.loads(pickle.dumps(dataset))
    for index in range(len(dataset)):
        assert (sent[index]["input"] == dataset[index]["input"]).all()


def test_features_of_one_trunk_are_not_taken_for_anothers(root, tmp_path):
    for seed in (0, 1):
        make(root, tmp_path, mode="frozen", seed=seed).run_fold(FOLDS[0], 0)
    assert len(list((tmp_path / "cache").glob("*.features.npy"))) == 2 * COUNT


def test_bundle_predicts_what_the_fold_did(root, tmp_path):
    experiment = make(root, tmp_path)
    result = experiment.run(FOLDS[:1])
    model = load_bundle(tmp_path)
    for prediction in result.predictions:
        case = experiment.cases[int(prediction.case_id[4:])]
        again = model.predict_slices(experiment.slices.load(case), case)
        assert again.probabilities == pytest.approx(prediction.probabilities, abs=1e-6)
        assert again.threshold == prediction.threshold == 0.1


@pytest.mark.parametrize("mode", STAGES)
def test_labels_of_the_test_fold_do_not_reach_the_weights(mode, root, tmp_path):
    flipped = [CLASSES[1 - CLASSES.index(label)] if i in FOLDS[0].test else label for i, label in enumerate(LABELS)]
    for name, labels in (("true", LABELS), ("flipped", flipped)):
        make(root, tmp_path / name, mode=mode, labels=labels).run_fold(FOLDS[0], 0)
    first, second = fold_weights(tmp_path / "true", 0), fold_weights(tmp_path / "flipped", 0)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_class_weights_come_from_the_training_cases_alone(root, tmp_path):
    make(root, tmp_path).run_fold(FOLDS[0], 0)  # trained on labels 0, 1, 0; balanced over all cases
    assert fold_weights(tmp_path, 0)["learning.weights"].tolist() == pytest.approx([3 / 4, 3 / 2])


def test_training_learns_what_tells_the_classes_apart(root, tmp_path):
    stages = [{"epochs": 12, "lr": 1e-2}]
    experiment = make(root, tmp_path, stages=stages, select="last")
    predictions = experiment.run_fold(FOLDS[0], 0).predictions
    score = {prediction.case_id: prediction.probabilities["bleed"] for prediction in predictions}
    assert min(score[f"case{i}"] for i in (5, 7, 9)) > max(score[f"case{i}"] for i in (6, 8))


def test_three_classes_have_no_threshold(root, tmp_path):
    labels = [("none", "benign", "malign")[i % 3] for i in range(COUNT)]
    recorder = Recorder()
    experiment = make(root, tmp_path, recorder=recorder)
    experiment = Experiment(
        experiment.config,
        cases_of(root, labels),
        ("none", "benign", "malign"),
        experiment.slices,
        tmp_path,
        recorder.judge(),
    )
    found = experiment.run_fold(FOLDS[0], 0)
    assert found.model.info.threshold is None
    assert not recorder.points
    assert all(len(prediction.probabilities) == 3 for prediction in found.predictions)


def with_data(experiment, **settings):
    data = experiment.config.data.model_copy(update=settings)
    return replace(experiment, config=experiment.config.model_copy(update={"data": data}))


def test_normalisation_of_training_is_that_of_the_training_cases_alone(root, tmp_path):
    experiment = with_data(make(root, tmp_path), normalise="training")
    info = experiment.run_fold(FOLDS[0], 0).model.info
    slices = [experiment.slices.load(experiment.cases[index]) for index in FOLDS[0].train]
    assert (info.mean, info.std) == window_statistics(slices, experiment.config.preprocessing.windows)


def test_augmentation_of_the_config_reaches_the_training_cases(root, tmp_path):
    plain, seen = make(root, tmp_path), []
    for experiment in (plain, with_data(plain, augment=AugmentConfig())):
        encoder = experiment._model(FOLDS[0].train).encoder
        seen.append(experiment.material.dataset(encoder, FOLDS[0].train, FOLDS[0].target)[0]["input"])
    assert seen[0].shape == seen[1].shape
    assert not torch.equal(seen[0], seen[1])


def test_workers_of_the_config_reach_the_fit(root, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "fit", lambda *given: seen.append(given[-1].workers))
    with_data(make(root, tmp_path), workers=3).refit(1)
    assert seen == [3]


@pytest.mark.parametrize(
    ("settings", "cells"),
    [
        ({}, None),
        ({"sampling": "balanced"}, [("bleed",), ("none",)]),
        (
            {"sampling": "balanced", "balance": ("label", "sex")},
            [("bleed", "F"), ("bleed", "M"), ("none", "F"), ("none", "M")],
        ),
        ({"sampling": "balanced", "balance": ("kernel",)}, [("B30f",), ("B70f",)]),
    ],
)
def test_cells_of_balanced_sampling_are_those_of_the_config(settings, cells, root, tmp_path):
    experiment = make(root, tmp_path)
    cases = [
        replace(case, sex="FM"[i % 3 == 0], attributes={"kernel": ("B30f", "B70f")[i % 2]})
        for i, case in enumerate(experiment.cases)
    ]
    experiment = with_data(replace(experiment, cases=cases), **settings)
    everyone = np.arange(COUNT)
    strata = experiment.material.dataset(experiment._model(everyone).encoder, everyone, everyone[:0]).strata
    if cells is None:
        assert strata is None
        return
    columns = settings.get("balance", ("label",))
    seen = {
        tuple({"label": case.label, "sex": case.sex, **case.attributes}[name] for name in columns): number
        for case, number in zip(cases, strata.tolist(), strict=True)
    }
    assert seen == {cell: number for number, cell in enumerate(cells)}


def test_a_column_to_balance_by_that_nobody_has_is_an_error(root, tmp_path):
    with pytest.raises(UsageError, match="kernal"):
        with_data(make(root, tmp_path), sampling="balanced", balance=("kernal",))


def test_seed_of_the_config_decides_the_slices_that_are_drawn(root, tmp_path):
    experiment = make(root, tmp_path, seed=5)
    encoder = experiment._model(FOLDS[0].train).encoder
    assert experiment.material.dataset(encoder, FOLDS[0].train, FOLDS[0].target).seed == 5


def test_slices_at_once_are_as_many_as_asked_for(root, tmp_path):
    experiment = make(root, tmp_path)
    inference = InferenceConfig(batch_slices=3)
    experiment = replace(experiment, config=experiment.config.model_copy(update={"inference": inference}))
    assert experiment._model(FOLDS[0].train).encoder.batch_slices == 3


def tuned(experiment: Experiment, tuning: str, **data: Any) -> Experiment:
    config = experiment.config
    model = config.model.model_copy(update={"tuning": tuning})
    settings = config.data.model_copy(update=data)
    return replace(experiment, config=config.model_copy(update={"model": model, "data": settings}))


def files_of(folder: Path) -> int:
    return len(list((folder / "cache").glob("*.features.npy")))


@pytest.mark.parametrize(("tuning", "cached"), [("full", False), ("linear", True), ("lora", False), ("synqt", True)])
def test_what_of_a_backbone_never_changes_is_computed_once(tuning, cached, root, tmp_path):
    tuned(make(root, tmp_path), tuning).run_fold(FOLDS[0], 0)
    assert files_of(tmp_path) == cached * COUNT


@pytest.mark.parametrize("tuning", ["linear", "synqt"])
def test_a_cached_trunk_trains_to_what_an_uncached_one_does(tuning, root, tmp_path, monkeypatch):
    with_cache = tuned(make(root, tmp_path / "with"), tuning).run_fold(FOLDS[0], 0)
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("medvit.training.material.shutil", full)
    said: list[str] = []
    experiment = tuned(make(root, tmp_path / "without"), tuning)
    experiment.material.reporter = replace(experiment.material.reporter, say=said.append)
    without = experiment.run_fold(FOLDS[0], 0)
    assert (files_of(tmp_path / "with"), files_of(tmp_path / "without")) == (COUNT, 0)
    assert any("not cached: no room" in line for line in said)
    for one, other in zip(with_cache.predictions, without.predictions, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_nothing_is_taken_from_a_cache_that_augmentation_would_change(root, tmp_path):
    tuned(make(root, tmp_path), "synqt", augment=AugmentConfig()).run_fold(FOLDS[0], 0)
    assert files_of(tmp_path) == 0


def test_features_taken_otherwise_are_not_taken_for_each_other(root, tmp_path):
    for features in ("cls_mean", "pooled"):
        experiment = make(root, tmp_path, mode="frozen")
        model = experiment.config.model.model_copy(update={"features": features})
        replace(experiment, config=experiment.config.model_copy(update={"model": model})).run_fold(FOLDS[0], 0)
    assert files_of(tmp_path) == 2 * COUNT


def test_features_of_a_model_with_other_options_are_not_taken_for_each_other(root, tmp_path):
    """Other heads have weights of the same shapes, and other features."""
    for heads in (2, 4):
        experiment = make(root, tmp_path, mode="frozen")
        options = {**experiment.config.model.options, "num_heads": heads}
        model = experiment.config.model.model_copy(update={"options": options})
        replace(experiment, config=experiment.config.model_copy(update={"model": model})).run_fold(FOLDS[0], 0)
    assert files_of(tmp_path) == 2 * COUNT


def test_synqt_predicts_from_its_bundle_what_its_folds_did(root, tmp_path):
    result = tuned(make(root, tmp_path), "synqt").run(FOLDS[:1])
    model = load_bundle(tmp_path)
    slices = SliceCache(tmp_path / "cache", model.preprocessing)
    for judged in result.judged:
        again = model.predict_slices(slices.load(judged.case), judged.case)
        assert again.probabilities == pytest.approx(judged.prediction.probabilities, abs=1e-5)


def scanned(experiment: Experiment, other: str, where: np.ndarray) -> Experiment:
    """With another kernel or body part in some cases."""
    plain = {"kernel": "H30s", "body_part": "CHEST"}
    named = {"B70f": {"kernel": "B70f"}, "HEAD": {"body_part": "HEAD"}}[other]
    cases = [
        replace(case, acquisition=plain | (named if index in where else {}))
        for index, case in enumerate(experiment.cases)
    ]
    return replace(experiment, cases=cases)


def test_what_a_model_knows_of_scanners_is_of_the_cases_that_it_learned_from(root, tmp_path):
    """Of those that it is judged by it must be surprised, as it will be in deployment."""
    experiment = scanned(make(root, tmp_path, mode="frozen"), "B70f", FOLDS[0].test)
    result = experiment.run_fold(FOLDS[0], 0)
    assert result.model.info.training_range.kernels == ("H30s",)
    assert result.model.info.provenance["cases"] == str(len(FOLDS[0].train))
    assert all("UNSEEN_KERNEL" in prediction.flags for prediction in result.predictions)


def test_a_case_that_deployment_would_refuse_has_no_score_out_of_fold(root, tmp_path):
    first, *others = FOLDS[0].test
    experiment = scanned(make(root, tmp_path, mode="frozen"), "HEAD", np.array([first]))
    result = experiment.run_fold(FOLDS[0], 3)
    assert [prediction.case_id for prediction in result.predictions] == [experiment.cases[i].case_id for i in others]
    assert [(one.case.case_id, one.fold) for one in result.refused] == [(experiment.cases[first].case_id, 3)]
    experiment.check(FOLDS)


@pytest.mark.parametrize("side", ["val", "test"])
def test_folds_that_leave_nothing_to_judge_are_refused_before_training(side, root, tmp_path):
    """A single validation case of its class decides the threshold, and will get no score: no training has begun."""
    where = getattr(FOLDS[1], side)
    experiment = scanned(make(root, tmp_path, mode="frozen"), "HEAD", where[:1] if side == "val" else where)
    with pytest.raises(UsageError, match=rf"the model will refuse \d of \d {side if side == 'test' else 'validation'}"):
        experiment.run(FOLDS)
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_case_is_compared_with_was_learned_from(root, tmp_path, monkeypatch):
    seen, know = [], experiments.know
    monkeypatch.setattr(experiments, "know", lambda pooled, kind: seen.append(pooled) or know(pooled, kind))
    experiment = make(root, tmp_path, mode="frozen")
    result = experiment.run_fold(FOLDS[0], 0)
    (known,) = seen
    np.testing.assert_array_equal(known, experiment.material.pooled(result.model, FOLDS[0].train))


def test_features_of_a_fold_with_a_normalisation_of_its_own_are_its_own(root, tmp_path):
    """Those of another fold were normalised by cases that this one judges."""
    experiment = make(root, tmp_path, mode="frozen")
    config = experiment.config.model_copy(
        update={"data": experiment.config.data.model_copy(update={"normalise": "training"})}
    )
    experiment = replace(experiment, config=config)
    models = [experiment.run_fold(fold, number).model for number, fold in enumerate(FOLDS)]
    assert models[0].encoder.mean != models[1].encoder.mean
    assert files_of(tmp_path) == 2 * COUNT


def test_a_class_called_none_is_not_what_has_no_label(root, tmp_path):
    experiment = make(root, tmp_path)
    cases = [replace(case, label=("None", "yes", None)[index % 3]) for index, case in enumerate(experiment.cases)]
    material = replace(experiment, cases=cases, classes=("None", "yes")).material
    assert material.labels.tolist() == [(0, 1, -1)[index % 3] for index in range(len(cases))]


def test_balanced_drawing_leaves_nothing_to_weigh(root, tmp_path):
    """Ten to one is drawn one to one: weights on top would turn it round."""
    experiment = make(root, tmp_path, labels=[CLASSES[int(index == 0)] for index in range(COUNT)])
    everyone = np.arange(COUNT)
    assert experiment.material.drawn(everyone).tolist() == [COUNT - 1, 1]
    data = experiment.config.data.model_copy(update={"sampling": "balanced", "balance": ("label",)})
    balanced = replace(experiment, config=experiment.config.model_copy(update={"data": data}))
    assert balanced.material.drawn(everyone).tolist() == [COUNT // 2] * 2


@pytest.mark.parametrize("changed", ["weights", "validation", "site"])
def test_a_fit_of_other_inputs_is_not_gone_on_with(changed, root, tmp_path):
    """A frozen backbone is in no checkpoint; who judges and whose site it is stand in no configuration."""
    experiment = make(root, tmp_path, mode="frozen")
    experiment.run_fold(FOLDS[0], 0)
    judged = FOLDS[0].val if changed == "validation" else ()
    cases = [
        replace(case, label=CLASSES[1 - CLASSES.index(case.label)] if index in judged else case.label)
        for index, case in enumerate(experiment.cases)
    ]
    if changed == "site":
        cases[FOLDS[0].train[0]] = replace(cases[FOLDS[0].train[0]], site="South")
    config = experiment.config
    if changed == "weights":  # what would stand in another file of the same name
        options = {**config.model.options, "init_values": 0.5}
        config = config.model_copy(update={"model": config.model.model_copy(update={"options": options})})
    with pytest.raises(UsageError, match="made by another configuration"):
        replace(experiment, cases=cases, config=config, resume=True).run_fold(FOLDS[0], 0)
