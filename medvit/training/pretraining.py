"""Pretraining without labels: one fit on all patients but a few, whose slices tell whether the encoder still sees.

The result is a bundle without classes, which `model.weights=RUN` takes. There is nothing to choose an epoch by, so the
last one is kept. Labels, where there are some, teach nothing: they judge. How, is given as a function: training does
not know evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from medvit.data.slice_views import ViewDataset
from medvit.data.splits import Fold, Indices
from medvit.inference import Encoder
from medvit.io.disk import write_whole
from medvit.models.bundle import save_bundle
from medvit.models.bundle_info import BundleInfo
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.weights import WeightReport, check_input
from medvit.objectives import Objective, Task, build_objective
from medvit.records import UsageError
from medvit.training import processes
from medvit.training.collapse import examine
from medvit.training.experiment import provenance, stages_of, training_range
from medvit.training.material import Labels
from medvit.training.normalising import mean_and_std
from medvit.training.runner import Runner, Validation, Watch
from medvit.training.state import History, Metrics
from medvit.training.timing import Timing, time_step

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Probe = Callable[[Floats, Labels, Floats, Labels], Metrics]
"""(features (N, D), class index (N,)) of training patients, then of validation patients -> figures."""


class Learning(NamedTuple):
    """What is trained, what it is shown, and the normalisation and weights that it began with."""

    objective: Objective
    dataset: ViewDataset
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: WeightReport


@dataclass
class Pretraining(Runner):
    """A run without labels on all cases that could be read, some of which may have labels.

    Attributes:
        probe: how labels judge features; None: they do not. All else as in `Runner`.
    """

    probe: Probe | None = None

    def run(self, fold: Fold) -> History:
        """Train on the training side, watch the validation side, write RUN/bundle.

        Raises:
            UsageError: fewer than two training patients, small crops that are no multiple of the patch, and as `fit`.
        """
        folder = self.folder / "checkpoints" / "pretraining"
        learning, history = self.fit_fold(fold, folder, "pretraining")
        if processes.first():
            self._copy_metrics(folder)
            save_bundle(self.folder / "bundle", self._judged(learning.objective), self._info(learning))
        processes.wait()
        return history

    def fit_fold(self, fold: Fold, folder: Path, name: str, watch: Watch | None = None) -> tuple[Learning, History]:
        """Train on the training side.

        Args:
            fold: its training and validation cases are used.
            folder: of the checkpoints.
            name: shown with the progress.
            watch: called with what is trained, before the first epoch and after each.

        Raises:
            UsageError: as `run`.
        """
        learning = self._learning(fold.train)
        objective, dataset = learning.objective, learning.dataset
        for line in stages_of(objective.classifier, self.config.training.stages):
            self.reporter.say(line)

        def tell(row: dict[str, object]) -> None:
            self._copy_metrics(folder)
            self.reporter.epoch(row)

        validation = Validation(lambda: self._validate(learning, fold), fold.val)
        history = self._fit(objective, dataset, validation, folder, name, watch=watch, on_epoch=tell)
        return learning, history

    def time_step(self, train: Indices) -> Timing:
        """Time one training step on the first batch, after one to warm up."""
        objective, dataset, *_ = self._learning(train)
        training = self.config.training
        return Timing(0.0, time_step(objective, dataset, training.stages[-1], training.batch_size))

    def _learning(self, train: Indices) -> Learning:
        """A model with the weights that the config names, its objective, and views of the training cases."""
        config, chosen = self.config, [self.cases[index] for index in train]
        if len({case.group for case in chosen}) < 2:
            raise UsageError("pretraining needs two patients to learn from and one to validate on. Give more CT.")
        torch.manual_seed(config.training.seed)
        prep = config.preprocessing
        classifier, weights = build_classifier(config.model, size=prep.size, channels=len(prep.windows), classes=1)
        self._check_crops(classifier)
        mean, std = mean_and_std(config, classifier, map(self.slices.load, chosen))
        check_input(weights, prep, mean, std)
        objective = build_objective(classifier, config.objective, Task(()))
        data = config.data
        dataset = ViewDataset(
            chosen, self.slices.load, prep, data.augment, data.views, mean, std, seed=config.training.seed
        )
        return Learning(objective, dataset, mean, std, weights)

    def _check_crops(self, classifier: CtClassifier) -> None:
        views, patch = self.config.data.views, classifier.backbone.patch
        if views.local and views.local_size % patch:
            raise UsageError(
                f"data.views.local_size {views.local_size} is no multiple of the model's patch of {patch} px: use "
                f"{patch * max(1, views.local_size // patch)}."
            )

    def _judged(self, objective: Objective) -> CtClassifier:
        """The encoder that is kept, as a classifier of which only the backbone has learned anything."""
        backbone = objective.encoder()
        if backbone is objective.classifier.backbone:
            return objective.classifier
        return CtClassifier(backbone, self.config.model, 1).to(next(backbone.parameters()).device)

    def _validate(self, learning: Learning, fold: Fold) -> Metrics:
        """Rank and spread of the features of validation slices; with labels, what a probe makes of cases."""
        judged = self._judged(learning.objective)
        encoder = Encoder(
            judged, self.config.preprocessing, learning.mean, learning.std, self.config.inference.batch_slices
        )
        slices = self._features(encoder, fold.val)
        health = examine(np.concatenate(slices))
        if health.collapsed and processes.first():
            _log.warning(
                "COLLAPSE: features of validation slices have effective rank %.2f and spread %.3f: slices are hardly "
                "told apart. Stop; lower the learning rate, or change temperature or batch size.",
                health.rank,
                health.spread,
            )
        found = {"effective_rank": health.rank, "feature_spread": health.spread}
        if health.telling:
            found["collapsed"] = float(health.collapsed)
        return found | self._probed(encoder, fold, slices)

    def _probed(self, encoder: Encoder, fold: Fold, val: Sequence[Floats]) -> Metrics:
        if self.probe is None:
            return {}
        known: dict[str | None, int] = {name: number for number, name in enumerate(self.classes)}
        labels = np.array([known.get(case.label, -1) for case in self.cases], np.int64)
        train = fold.train[labels[fold.train] >= 0]
        judged = labels[fold.val] >= 0
        if not len(train) or not judged.any():
            return {}
        bank = np.stack([one.mean(axis=0) for one in self._features(encoder, train)])
        asked = np.stack([one.mean(axis=0) for one in val])[judged]
        return self.probe(bank, labels[train], asked, labels[fold.val][judged])

    def _features(self, encoder: Encoder, chosen: Indices) -> list[Floats]:
        """(S, D) of the slices of each chosen case that a prediction looks at."""

        def encode(mine: Sequence[int]) -> list[Floats]:
            volumes = (self.slices.load(self.cases[index]) for index in mine)
            return [encoder.encode(volume[encoder.choose(len(volume))]) for volume in volumes]

        return processes.shared(chosen.tolist(), encode)

    def _copy_metrics(self, folder: Path) -> None:
        """The rows of all epochs so far, before a resume or after it, where people look for them."""
        rows = (folder / "metrics.jsonl").read_bytes()
        write_whole(self.folder / "metrics.jsonl", rows)

    def _info(self, learning: Learning) -> BundleInfo:
        return BundleInfo(
            architecture=self.config.model.model_copy(update={"weights": learning.weights.source}),
            preprocessing=self.config.preprocessing,
            mean=learning.mean,
            std=learning.std,
            classes=(),
            training_range=training_range(learning.dataset.cases),
            provenance=provenance(self.config, learning.dataset.cases, learning.weights)
            | {"objective": self.config.objective.name},
        )
