"""A whole experiment: folds, a model for each, predictions on cases it never saw, and one bundle to deploy.

With folds the bundle is a refit on all labelled cases for the median best epoch, and its operating point comes from the
out-of-fold predictions. How models are judged is given as functions: training does not know evaluation.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from medvit import __version__
from medvit.config import Config
from medvit.data.cache import FeatureCache, SliceCache
from medvit.data.dataset import CaseDataset, collate
from medvit.data.pipelines import Slices, training_transform, window_statistics
from medvit.data.splits import Fold, Indices
from medvit.inference import Encoder, Model, with_operating_point
from medvit.models.backbone import WeightReport, normalisation
from medvit.models.bundle import BundleInfo, TrainingRange, save_bundle
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.objectives import OBJECTIVES
from medvit.objectives.supervised import Objective
from medvit.records import Case, Prediction
from medvit.training.loop import History, Metrics, Run, fit, write_metrics

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judge:
    """How models are judged, by functions of (labels (N,) class index, probabilities (N, K)).

    Attributes:
        score: -> AUROC; NaN where undefined.
        operating_point: -> threshold on the last class; only called for two classes.
    """

    score: Callable[[npt.NDArray[np.int64], Floats], float]
    operating_point: Callable[[npt.NDArray[np.int64], Floats], float]


@dataclass(frozen=True)
class Reporter:
    """How progress is shown; the defaults show nothing."""

    start: Callable[[str, int], None] = lambda _what, _total: None
    step: Callable[[str], None] = lambda _: None
    epoch: Callable[[dict[str, Any]], None] = lambda _: None


@dataclass(frozen=True)
class Result:
    """Predictions on held-out cases (out of fold, or of the test split), and where the model is."""

    predictions: tuple[Prediction, ...]
    bundle: Path
    histories: tuple[History, ...]


class Timing(NamedTuple):
    """Seconds: to prepare one case once (features of a frozen backbone), and for one training step."""

    prepare_case: float
    step: float


@dataclass
class Experiment:
    """Everything that stays the same over the folds.

    Attributes:
        config: the run's.
        cases: labelled.
        classes: names in order.
        slices: cache of prepared slices.
        folder: RUN.
        judge: how to judge.
        reporter: how to show progress.
        resume: continue what is in `folder`.
    """

    config: Config
    cases: Sequence[Case]
    classes: tuple[str, ...]
    slices: SliceCache
    folder: Path
    judge: Judge
    reporter: Reporter = field(default_factory=Reporter)
    resume: bool = False
    weights: WeightReport = field(default_factory=lambda: WeightReport("none"), init=False)
    features: FeatureCache | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.labels = np.array([self.classes.index(str(case.label)) for case in self.cases], np.int64)
        head_only = all(stage.trainable == "head" for stage in self.config.training.stages)
        # a frozen trunk without random input gives the same features every epoch: computed once (DESIGN decision 9)
        self.frozen = head_only and self.config.data.augment is None

    def run(self, folds: Sequence[Fold]) -> Result:
        """Train, predict held-out cases, write the bundle."""
        done = []
        for number, fold in enumerate(folds):
            done.append(self.run_fold(fold, number))
            self._write_metrics([history for _, history, _ in done])
        predictions = [prediction for found, _, _ in done for prediction in found]
        histories = tuple(history for _, history, _ in done)
        if len(folds) == 1:
            model = done[0][2]
            info = model.info
        else:
            epochs = max(1, round(statistics.median(history.best_epoch for history in histories)))
            model = self.refit(epochs)
            info = model.info.model_copy(update={"threshold": self._threshold(predictions)})
        save_bundle(self.folder / "bundle", model.encoder.classifier, info)
        return Result(tuple(predictions), self.folder / "bundle", histories)

    def run_fold(self, fold: Fold, number: int) -> tuple[list[Prediction], History, Model]:
        """Train one fold: epoch and threshold are chosen on its validation cases, its test cases are predicted once."""
        folder = self.folder / "checkpoints" / f"fold{number}"
        model = self._model(fold.train)
        objective = self._objective(model.encoder.classifier, fold.train)
        dataset = self._dataset(model.encoder, fold.train)
        name = f"fold {number + 1}" if self.config.data.folds else "training"
        self._start(name, dataset, sum(stage.epochs for stage in self.config.training.stages))
        run = self._run_settings(folder)
        history = fit(objective, dataset, self.config.training, lambda: self._validate(model, fold.val), run)
        validation = self._predict(model, fold.val)
        model = replace(model, info=model.info.model_copy(update={"threshold": self._threshold(validation)}))
        held_out = with_operating_point(self._predict(model, fold.test), model.info.threshold)
        return [replace(prediction, fold=number) for prediction in held_out], history, model

    def refit(self, epochs: int) -> Model:
        """Train on all cases for a given number of epochs, without validation."""
        everyone = np.arange(len(self.cases))
        model = self._model(everyone)
        objective = self._objective(model.encoder.classifier, everyone)
        dataset = self._dataset(model.encoder, everyone)
        self._start("refit on all cases", dataset, epochs)
        run = replace(self._run_settings(self.folder / "checkpoints" / "refit"), stop_after=epochs)
        fit(objective, dataset, self.config.training, dict, run)
        return model

    def _write_metrics(self, histories: Sequence[History]) -> None:
        rows = ({"fold": number, **row} for number, history in enumerate(histories) for row in history.rows)
        write_metrics(self.folder / "metrics.jsonl", rows)

    def time_step(self, train: Indices) -> Timing:
        """Time one training step on the first batch of the given cases, after one to warm up."""
        few = replace(self, cases=[self.cases[index] for index in train[: self.config.training.batch_size]])
        everyone = np.arange(len(few.cases))
        model = few._model(everyone)
        objective = self._objective(model.encoder.classifier, train)
        objective.classifier.freeze_backbone(self.config.training.stages[-1].trainable == "head")
        began = time.perf_counter()
        dataset = few._dataset(model.encoder, everyone)
        prepare = (time.perf_counter() - began) / len(everyone)
        took = 0.0
        for _ in range(2):
            began = time.perf_counter()
            objective(collate([dataset[index] for index in range(len(dataset))]), 0.0)["loss"].backward()
            took = time.perf_counter() - began
        return Timing(prepare, took)

    def _run_settings(self, folder: Path) -> Run:
        return Run(
            folder=folder,
            resume=self.resume,
            workers=self.config.data.workers,
            on_step=self.reporter.step,
            on_epoch=self.reporter.epoch,
        )

    def _start(self, name: str, dataset: CaseDataset, epochs: int) -> None:
        batches = -(-len(dataset) // self.config.training.batch_size)
        self.reporter.start(name, batches * epochs)

    def _model(self, train: Indices) -> Model:
        """An untrained model with the weights that the config names, normalised for the given training cases."""
        torch.manual_seed(self.config.training.seed)
        prep = self.config.preprocessing
        channels = len(prep.windows)
        classifier, self.weights = build_classifier(
            self.config.model, size=prep.size, channels=channels, classes=len(self.classes)
        )
        mean, std = self._normalisation(classifier, train)
        info = BundleInfo(
            architecture=self.config.model.model_copy(update={"weights": self.weights.source}),
            preprocessing=prep,
            mean=mean,
            std=std,
            classes=self.classes,
            training_range=training_range(self.cases),
            provenance=self._provenance(),
        )
        return Model(Encoder(classifier, prep, mean, std, self.config.inference.batch_slices), info)

    def _normalisation(self, classifier: CtClassifier, train: Indices) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std per window: given, of the training split and of no other, or the backbone's own."""
        prep = self.config.preprocessing
        if prep.mean is not None and prep.std is not None:
            return prep.mean, prep.std
        if self.config.data.normalise == "training":
            return window_statistics((self.slices.load(self.cases[index]) for index in train), prep.windows)
        return normalisation(classifier.backbone, len(prep.windows))

    def _provenance(self) -> dict[str, str]:
        return {
            "medvit": __version__,
            "torch": torch.__version__,
            "seed": str(self.config.training.seed),
            "cases": str(len(self.cases)),
            "patients": str(len({case.patient_id for case in self.cases})),
            "pretrained": self.weights.source,
            "pretrained_sha256": self.weights.sha256,
        }

    def _objective(self, classifier: CtClassifier, train: Indices) -> Objective:
        counts = np.bincount(self.labels[train], minlength=len(self.classes))
        return OBJECTIVES[self.config.objective.name](classifier, self.config.objective, counts.tolist())

    def _dataset(self, encoder: Encoder, chosen: Indices) -> CaseDataset:
        prep, seed = self.config.preprocessing, self.config.training.seed
        cases = [self.cases[index] for index in chosen]
        if self.frozen:
            features = self._features(encoder)
            return CaseDataset(
                cases, features, self.labels[chosen], slices=prep.train_slices, transform=None, seed=seed
            )
        transform = training_transform(prep, self.config.data.augment, encoder.mean, encoder.std)
        return CaseDataset(
            cases, self.slices.load, self.labels[chosen], slices=prep.train_slices, transform=transform, seed=seed
        )

    def _features(self, encoder: Encoder) -> Callable[[Case], npt.NDArray[np.float32]]:
        """Features of every slice of a case, from the cache, computed where missing."""
        prep = self.config.preprocessing
        model = self.config.model.model_dump(mode="json")
        settings = json.dumps([prep.model_dump(mode="json"), encoder.mean, encoder.std, model])
        backbone = f"{settings} {self.weights.sha256} {self.config.training.seed}"
        if self.features is None or self.features.backbone_hash != backbone:  # each fold may normalise by its own split
            self.features = FeatureCache(self.slices, backbone)
            self._encode([case for case in self.cases if self.features.find(case) is None], encoder, self.features)
        return self.features.load  # a method, which loader processes can be sent

    def _encode(self, missing: Sequence[Case], encoder: Encoder, cache: FeatureCache) -> None:
        """Compute features, many small cases at once, and keep them in the cache."""
        if missing:
            self.reporter.start("features of the frozen backbone", len(missing))
        pending: list[tuple[Case, Slices]] = []
        for number, case in enumerate(missing, 1):
            pending.append((case, self.slices.load(case)))
            if sum(len(slices) for _, slices in pending) < encoder.batch_slices and number < len(missing):
                continue
            encoded = encoder.encode(np.concatenate([slices for _, slices in pending]))
            ends = np.cumsum([len(slices) for _, slices in pending])[:-1]
            for (done, _), features in zip(pending, np.split(encoded, ends), strict=True):
                cache.save(done, features)
                self.reporter.step("")
            pending = []

    def _predict(self, model: Model, chosen: Indices) -> list[Prediction]:
        """Predictions of the chosen cases, the numbers of `Model.predict`; features from the cache where frozen."""
        if not self.frozen:
            return [model.predict_slices(self.slices.load(self.cases[i]), self.cases[i]) for i in chosen]
        features = self._features(model.encoder)
        cases = [self.cases[index] for index in chosen]
        looked_at = [model.encoder.choose(len(features(case))) for case in cases]
        outputs = model.encoder.studies([features(case)[at] for case, at in zip(cases, looked_at, strict=True)])
        return [
            model.prediction(case, logits, at, weights)
            for case, at, (logits, weights) in zip(cases, looked_at, outputs, strict=True)
        ]

    def _validate(self, model: Model, chosen: Indices) -> Metrics:
        labels, probabilities = self._table(self._predict(model, chosen))
        right = probabilities[np.arange(len(labels)), labels]
        return {
            "auroc": self.judge.score(labels, probabilities),
            "loss": float(-np.log(np.clip(right, 1e-7, 1)).mean()),
        }

    def _threshold(self, predictions: Sequence[Prediction]) -> float | None:
        if len(self.classes) != 2:
            return None
        labels, probabilities = self._table(predictions)
        return self.judge.operating_point(labels, probabilities)

    def _table(self, predictions: Sequence[Prediction]) -> tuple[npt.NDArray[np.int64], Floats]:
        labels = np.array([self.classes.index(str(prediction.label)) for prediction in predictions], np.int64)
        return labels, np.array(
            [[prediction.probabilities[name] for name in self.classes] for prediction in predictions]
        )


def training_range(cases: Sequence[Case]) -> TrainingRange:
    """What the training scans were, kept in the bundle so that other input can be told apart."""

    def seen(name: str) -> tuple[str, ...]:
        return tuple(sorted({case.acquisition[name] for case in cases if case.acquisition.get(name)}))

    thickness = [float(value) for value in seen("slice_thickness_mm")]
    return TrainingRange(
        body_parts=seen("body_part"),
        kernels=seen("kernel"),
        manufacturers=seen("manufacturer"),
        contrast=seen("contrast"),
        slice_thickness_mm=(min(thickness), max(thickness)) if thickness else None,
    )
