"""A whole experiment: folds, a model for each, predictions on cases it never saw, and one bundle to deploy.

With folds the bundle is a refit on all labelled cases for the median best epoch, and its operating point comes from the
out-of-fold predictions. With target cases, what adaptation did is told apart from the result: AUROC at the sources, at
the target, and what choosing the epoch by target labels would have given. How models are judged is given as functions:
training does not know evaluation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from medvit import __version__
from medvit.config import Config, Stage
from medvit.data.dataset import CaseDataset
from medvit.data.splits import NOBODY, Fold, Indices
from medvit.inference import Encoder, Judged, Model, softmax
from medvit.models.bundle import save_bundle
from medvit.models.bundle_info import BundleInfo, TrainingRange
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.reference import conformal_threshold, know, one_per_patient
from medvit.models.weights import WeightReport, check_input
from medvit.objectives import Objective, Task, build_objective
from medvit.records import Case, Prediction, UsageError
from medvit.training import adaptation, processes
from medvit.training.journal import write_metrics
from medvit.training.material import Floats, Labels, Material
from medvit.training.normalising import mean_and_std
from medvit.training.runner import Runner, Validation, Watch
from medvit.training.state import History, Metrics
from medvit.training.timing import Timing, time_step


@dataclass(frozen=True)
class Judge:
    """How models are judged, by functions of (labels (N,) class index, probabilities (N, K)).

    Attributes:
        score: -> AUROC; NaN where undefined.
        operating_point: -> threshold on the last class; only called for two classes.
        temperature: -> what to divide logits by, from probabilities at temperature 1.
    """

    score: Callable[[Labels, Floats], float]
    operating_point: Callable[[Labels, Floats], float]
    temperature: Callable[[Labels, Floats], float]


class Refused(NamedTuple):
    """A held-out case that the model of its fold must not be asked about: it has no score, as in deployment."""

    case: Case
    fold: int


class FoldResult(NamedTuple):
    """Of one fold: test cases that were `asked`, their predictions at temperature 1 (`raw`) and as reported; others."""

    asked: Indices
    raw: list[Prediction]
    judged: list[Judged]
    refused: list[Refused]
    history: History
    model: Model

    @property
    def predictions(self) -> list[Prediction]:
        """Of the test cases, as reported."""
        return [one.prediction for one in self.judged]


@dataclass(frozen=True)
class Result:
    """Held-out cases (out of fold, or of the test split) as they were predicted or refused, and where the model is."""

    judged: tuple[Judged, ...]
    refused: tuple[Refused, ...]
    bundle: Path
    histories: tuple[History, ...]

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """Of the held-out cases."""
        return tuple(one.prediction for one in self.judged)


@dataclass
class Experiment(Runner):
    """A run on labelled cases, and unlabelled ones of target sites: what stays the same over its folds.

    Attributes:
        judge: how to judge; all else as in `Runner`.
    """

    judge: Judge
    weights: WeightReport = field(default_factory=lambda: WeightReport("none"), init=False)
    told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.material = Material(self.config, self.cases, self.classes, self.slices, self.reporter)

    def run(self, folds: Sequence[Fold]) -> Result:
        """Train, predict held-out cases, write the bundle."""
        self.check(folds)
        done = []
        for number, fold in enumerate(folds):
            done.append(self.run_fold(fold, number))
            self._write_metrics([one.history for one in done])
        judged = tuple(case for one in done for case in one.judged)
        refused = tuple(case for one in done for case in one.refused)
        histories = tuple(one.history for one in done)
        if len(folds) == 1:
            model = done[0].model
            if len(folds[0].target):
                fold = replace(folds[0], test=done[0].asked)
                found = adaptation.measure(
                    self.material, model, fold, done[0].predictions, histories[0], score=self.judge.score
                )
                adaptation.write(found, self.folder / "adaptation.json")
                self._tell(found)
        else:
            epochs = max(1, round(statistics.median(history.best_epoch for history in histories)))
            model = self.refit(epochs).with_views(self.config.inference.tta)
            everyone = np.arange(len(self.cases))
            model = self._knowing(model, everyone)
            if self.material.frozen:  # else every case was learned from
                model = self._sampled(model, everyone, self.material.pooled(model, everyone))
            raw = [prediction for one in done for prediction in one.raw]
            model = self._decided(model, raw)
        if processes.first():
            save_bundle(self.folder / "bundle", model.encoder.classifier, model.info, model.reference)
        processes.wait()
        return Result(judged, refused, self.folder / "bundle", histories)

    def _tell(self, found: adaptation.Adaptation) -> None:
        self.reporter.say(f"  target and sources: {adaptation.told(found)}")
        if self.config.objective.adapts and found.lost > adaptation.COSTLY:
            self.reporter.say(
                f"  adaptation has cost the sources {found.lost:.2f} of their validation AUROC: a smaller "
                "objective.strength may lose less (--sweep strength compares)"
            )

    def run_fold(self, fold: Fold, number: int) -> FoldResult:
        """Train one fold: its validation cases choose epoch, temperature and threshold, its test is predicted once."""
        name = f"fold {number + 1}" if self.config.data.folds else "training"
        val, test = (self._asked(fold, side) for side in (fold.val, fold.test))
        refused = [Refused(self.cases[index], number) for index in np.setdiff1d(fold.test, test)]
        model, history = self.fit_fold(fold, self.folder / "checkpoints" / f"fold{number}", name)
        model = model.with_views(self.config.inference.tta)  # epochs were chosen without
        model = self._knowing(model, np.concatenate([fold.train, fold.target]))
        validation, outputs = (self.material.outputs(model, chosen) for chosen in (val, test))
        model = self._sampled(model, val, np.stack([output.pooled for _, output in validation]))
        as_it_is, model = model, self._decided(model, self.material.described(model, val, validation))
        raw, predictions = (
            [replace(prediction, fold=number) for prediction in self.material.described(one, test, outputs)]
            for one in (as_it_is, model)
        )
        judged = [
            Judged(model, self.cases[index], prediction, self.slices.load)
            for index, prediction in zip(test, predictions, strict=True)
        ]
        return FoldResult(test, raw, judged, refused, history, model)

    def fit_fold(self, fold: Fold, folder: Path, name: str, watch: Watch | None = None) -> tuple[Model, History]:
        """Train on one fold without a look at its test cases.

        Args:
            fold: its training and validation cases are used.
            folder: of the checkpoints.
            name: shown with the progress.
            watch: called with what is trained, before the first epoch and after each.

        Raises:
            UsageError: the objective adapts, and the fold has nothing to adapt to.
        """
        if self.config.objective.adapts and not len(fold.target):
            raise UsageError(
                f"objective.name {self.config.objective.name!r} adapts to unlabelled cases: name data.target_sites."
            )
        if self.config.training.select == "target" and not len(fold.target):
            raise UsageError("training.select: target looks at unlabelled cases: name data.target_sites.")
        model = self._model(fold.train, fold.target)
        objective, dataset = self._learning(model, fold.train, fold.target)
        if not self.told:
            self.told = True
            for line in stages_of(model.encoder.classifier, self.config.training.stages):
                self.reporter.say(line)
        validation = Validation(lambda: self._validate(model, fold), fold.val)
        return model, self._fit(objective, dataset, validation, folder, name, watch=watch)

    def check(self, folds: Sequence[Fold]) -> None:
        """Refuse folds whose models would refuse what they are judged or decided by, before anything is trained.

        Raises:
            UsageError: a class would be missing on the validation side, or all test cases.
        """
        for number, fold in enumerate(folds):
            for side, chosen in (("validation", fold.val), ("test", fold.test)):
                asked, labels = self._asked(fold, chosen), self.material.labels
                lost = set(labels[chosen]) - set(labels[asked]) if side == "validation" else not len(asked)
                if len(chosen) and lost:
                    raise UsageError(
                        f"fold {number + 1}: the model will refuse {len(chosen) - len(asked)} of {len(chosen)} {side} "
                        "cases, among them all of a class: no training scan is like them in what inference.refuse "
                        f"names ({', '.join(self.config.inference.refuse)}). Split so that there are some, or set "
                        "inference.refuse=[]."
                    )

    def _asked(self, fold: Fold, chosen: Indices) -> Indices:
        """Which of the chosen cases the model of a fold may be asked about; it will refuse others (`Model.refuse`)."""
        known = training_range([self.cases[index] for index in (*fold.train, *fold.target)])
        unlike = [
            not set(known.outside(self.cases[index].acquisition)).isdisjoint(self.config.inference.refuse)
            for index in chosen
        ]
        asked: Indices = chosen[~np.array(unlike, bool)]
        return asked

    def refit(self, epochs: int) -> Model:
        """Train on all cases for a given number of epochs, without validation."""
        everyone = np.arange(len(self.cases))
        model = self._model(everyone)
        objective, dataset = self._learning(model, everyone, everyone[:0])
        folder = self.folder / "checkpoints" / "refit"
        self._fit(objective, dataset, Validation(dict), folder, "refit on all cases", stop_after=epochs)
        return model

    def _write_metrics(self, histories: Sequence[History]) -> None:
        if processes.first():
            rows = ({"fold": number, **row} for number, history in enumerate(histories) for row in history.rows)
            write_metrics(self.folder / "metrics.jsonl", rows)

    def time_step(self, train: Indices, target: Indices = NOBODY) -> Timing:
        """Time one training step on the first batch of the given cases, after one to warm up."""
        labelled = train[: self.config.training.batch_size]
        unlabelled = target[: len(labelled) if self.config.objective.adapts else 0]
        few = replace(self, cases=[self.cases[index] for index in (*labelled, *unlabelled)])
        everyone = np.arange(len(few.cases))
        first, rest = everyone[: len(labelled)], everyone[len(labelled) :]
        model = few._model(first, rest)
        objective = self._objective(model.encoder.classifier, train, target)
        began = time.perf_counter()
        dataset = few.material.dataset(model.encoder, first, rest)
        prepare = (time.perf_counter() - began) / len(everyone)
        return Timing(prepare, time_step(objective, dataset, self.config.training.stages[-1], len(dataset)))

    def _model(self, train: Indices, target: Indices = NOBODY) -> Model:
        """An untrained model with the weights that the config names, normalised for the given training cases.

        It knows the acquisition of those, and of the target's that it will see too: of no case that it is judged on.
        """
        seen = [self.cases[index] for index in (*train, *target)]
        torch.manual_seed(self.config.training.seed)
        prep = self.config.preprocessing
        channels = len(prep.windows)
        classifier, self.weights = build_classifier(
            self.config.model, size=prep.size, channels=channels, classes=len(self.classes)
        )
        mean, std = mean_and_std(self.config, classifier, (self.slices.load(self.cases[index]) for index in train))
        check_input(self.weights, prep, mean, std)
        info = BundleInfo(
            architecture=self.config.model.model_copy(update={"weights": self.weights.source}),
            preprocessing=prep,
            mean=mean,
            std=std,
            classes=self.classes,
            training_range=training_range(seen),
            refuse=self.config.inference.refuse,
            provenance=provenance(self.config, seen, self.weights),
        )
        return Model(Encoder(classifier, prep, mean, std, self.config.inference.batch_slices), info)

    def _learning(self, model: Model, train: Indices, target: Indices) -> tuple[Objective, CaseDataset]:
        if not self.config.objective.adapts:  # the same split without adaptation: the baseline
            target = target[:0]
        dataset = self.material.dataset(model.encoder, train, target)
        return self._objective(model.encoder.classifier, train, target), dataset

    def _objective(self, classifier: CtClassifier, train: Indices, target: Indices) -> Objective:
        counts = self.material.drawn(train)
        domains = len({self.cases[index].site for index in (*train, *target)})
        task = Task(tuple(counts.tolist()), domains)
        return build_objective(classifier, self.config.objective, task)

    def _validate(self, model: Model, fold: Fold) -> Metrics:
        """How good the model is now: validation decides; the oracle, from target labels, is only written down."""
        labels, probabilities = self.material.table(self.material.predict(model, fold.val))
        right = probabilities[np.arange(len(labels)), labels]
        found = {
            "auroc": self.judge.score(labels, probabilities),
            "loss": float(-np.log(np.clip(right, 1e-7, 1)).mean()),
        }
        if self.config.training.select == "target" and len(fold.target):
            _, blind = self.material.table(self.material.predict(model, fold.target))
            found["target_information"] = adaptation.information(blind)
        judged = adaptation.judged_at_target(self.material, fold)
        if judged.any():
            oracle = self.material.table(self.material.predict(model, fold.test[judged]))
            found["oracle_auroc"] = self.judge.score(*oracle)
        return found

    def _knowing(self, model: Model, cases: Indices) -> Model:
        """With what these cases look like to the model; its threshold is not decided yet."""
        kind = self.config.inference.ood
        if kind is None or len(cases) < 2:
            return model
        return replace(model, reference=know(self.material.pooled(model, cases), kind))

    def _sampled(self, model: Model, cases: Indices, pooled: npt.NDArray[np.float32]) -> Model:
        """With the features of these cases to compare batches of new cases with."""
        if model.reference is None or not len(cases):
            return model
        sample = one_per_patient(pooled, [self.cases[index].patient_id for index in cases])
        return replace(model, reference=replace(model.reference, sample=sample))

    def _decided(self, model: Model, predictions: Sequence[Prediction]) -> Model:
        """With all that predictions at temperature 1, of cases that it did not learn from, decide.

        Temperature, for two classes the threshold, and how far is too far from what the model knows.
        """
        labels, probabilities = self.material.table(predictions)
        temperature, threshold = self.judge.temperature(labels, probabilities), None
        if len(self.classes) == 2:
            logits = np.log(np.clip(probabilities, 1e-12, 1))
            tempered = np.stack([softmax(row, temperature) for row in logits]).astype(np.float64)
            threshold = self.judge.operating_point(labels, tempered if temperature != 1 else probabilities)
        update = {"temperature": temperature, "threshold": threshold}
        far = [prediction.ood_score for prediction in predictions if prediction.ood_score is not None]
        known = model.reference and replace(
            model.reference, threshold=conformal_threshold(far, self.config.inference.ood_share)
        )
        return replace(model, info=model.info.model_copy(update=update), reference=known)


def stages_of(classifier: CtClassifier, stages: Sequence[Stage]) -> list[str]:
    """A line for each stage: how long, and how many parameters learn."""
    lines = []
    for stage in stages:
        classifier.set_trainable(stage.trainable, stage.blocks)
        trainable, everything = classifier.parameter_counts()
        size = f" at {stage.size} px" if stage.size else ""
        what = f"{trainable:,} of {everything:,} parameters learn"
        lines.append(f"stage {stage.name}: {stage.epochs} epochs{size}, {what}")
    return lines


def provenance(config: Config, cases: Sequence[Case], weights: WeightReport) -> dict[str, str]:
    """What a bundle tells about the run that made it, without identity."""
    return {
        "medvit": __version__,
        "torch": torch.__version__,
        "seed": str(config.training.seed),
        "cases": str(len(cases)),
        "patients": str(len({case.patient_id for case in cases})),
        "pretrained": weights.source,
        "pretrained_sha256": weights.sha256,
    }


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
