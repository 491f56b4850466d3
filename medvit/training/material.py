"""Cases as a model meets them: datasets to train on, predictions to judge, features to look into.

Where the backbone, or its trunk, is frozen and nothing random precedes it, it is computed once per slice and cached.
Several processes share predictions between them, and each ends up with all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from medvit.config import Config
from medvit.data.cache import FeatureCache, SliceCache
from medvit.data.dataset import CaseDataset
from medvit.data.pipelines import Slices, training_transform
from medvit.data.sampling import strata_of
from medvit.data.splits import Indices
from medvit.inference import Encoder, Model, StudyOutput
from medvit.models.backbone import Backbone
from medvit.objectives.objective import UNLABELLED
from medvit.records import Case, Prediction
from medvit.training import processes
from medvit.training.resume import digest_of

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reporter:
    """How progress is shown; the defaults show nothing."""

    start: Callable[[str, int], None] = lambda _what, _total: None
    step: Callable[[str], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None
    epoch: Callable[[dict[str, Any]], None] = lambda _: None


@dataclass
class Material:
    """The cases of an experiment.

    Attributes:
        config: the run's.
        cases: labelled, and unlabelled ones of target sites.
        classes: names in order.
        slices: cache of prepared slices.
        reporter: how to show progress.
        labels: (N,) class index; negative where there is none.
        domains: (N,) number of each case's site.
        strata: (N,) number of each case's cell of `data.balance`.
        frozen: the backbone never changes and always sees the same.
        constant: the same is true of its trunk at least.
    """

    config: Config
    cases: Sequence[Case]
    classes: tuple[str, ...]
    slices: SliceCache
    reporter: Reporter = field(default_factory=Reporter)
    features: FeatureCache | None = field(default=None, init=False)
    encoder: Encoder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        known: dict[str | None, int] = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([known.get(case.label, UNLABELLED) for case in self.cases], np.int64)
        sites = sorted({case.site for case in self.cases})
        self.domains = np.array([sites.index(case.site) for case in self.cases], np.int64)
        self.strata = strata_of(self.cases, self.config.data.balance)
        head_only = all(stage.trainable == "head" for stage in self.config.training.stages)
        same = self.config.data.augment is None
        self.frozen = same and (head_only or not self.config.model.learns)
        self.constant = same and (head_only or not self.config.model.trunk_learns)

    def dataset(self, encoder: Encoder, train: Indices, target: Indices) -> CaseDataset:
        """Training cases with their labels, and target cases without theirs."""
        prep, chosen = self.config.preprocessing, np.concatenate([train, target])
        _, domains = np.unique(self.domains[chosen], return_inverse=True)
        transform = partial(training_transform, prep, self.config.data.augment, encoder.mean, encoder.std)
        features = self._features(encoder)
        return CaseDataset(
            [self.cases[index] for index in chosen],
            self.slices.load if features is None else features.load,
            np.concatenate([self.labels[train], np.full(len(target), UNLABELLED)]),
            slices=prep.train_slices,
            transform=transform if features is None else None,
            seed=self.config.training.seed,
            domains=domains,
            strata=self.strata[chosen] if self.config.data.sampling == "balanced" else None,
        )

    def drawn(self, train: Indices) -> Labels:
        """How often each class is drawn, (K,): the cases of it, or as many as balanced sampling makes of them."""
        labels = self.labels[train]
        weights = np.ones(len(train))
        if self.config.data.sampling == "balanced":
            _, cell, size = np.unique(self.strata[train], return_inverse=True, return_counts=True)
            weights = len(train) / (len(size) * size[cell])
        counts = np.bincount(labels, weights, minlength=len(self.classes))
        return np.where(counts > 0, np.maximum(1, counts.round()), 0).astype(np.int64)

    def predict(self, model: Model, chosen: Indices) -> list[Prediction]:
        """Predictions of the chosen cases, the numbers of `Model.predict`."""
        return self.described(model, chosen, self.outputs(model, chosen))

    def described(
        self, model: Model, chosen: Indices, outputs: Sequence[tuple[Indices, StudyOutput]]
    ) -> list[Prediction]:
        """Predictions of the chosen cases from their `outputs`, at the temperature and threshold of the model."""
        return [
            model.prediction(self.cases[index], looked_at, output)
            for index, (looked_at, output) in zip(chosen, outputs, strict=True)
        ]

    def pooled(self, model: Model, chosen: Indices) -> npt.NDArray[np.float32]:
        """(N, D) features of whole studies as they are, what the head reads."""
        return np.stack([output.pooled for _, output in self.outputs(model.with_views(None), chosen)])

    def outputs(self, model: Model, chosen: Indices) -> list[tuple[Indices, StudyOutput]]:
        """For each chosen case the slices that were looked at, and what the model made of them."""
        return processes.shared(chosen.tolist(), lambda mine: self._outputs(model, mine))

    def _outputs(self, model: Model, chosen: Sequence[int]) -> list[tuple[Indices, StudyOutput]]:
        encoder = model.encoder
        features = self._features(encoder) if len(encoder.views) == 1 else None  # they are of one view
        if features is None:
            return [encoder.study(self.slices.load(self.cases[index])) for index in chosen]
        states = [features.load(self.cases[index]) for index in chosen]
        places = [encoder.choose(len(one)) for one in states]
        outputs = encoder.studies([encoder.finish(one[at]) for one, at in zip(states, places, strict=True)])
        return list(zip(places, outputs, strict=True))

    def table(self, predictions: Sequence[Prediction]) -> tuple[Labels, Floats]:
        """Class index (N,) and probabilities (N, K)."""
        known: dict[str | None, int] = {name: number for number, name in enumerate(self.classes)}
        labels = np.array([known.get(prediction.label, UNLABELLED) for prediction in predictions], np.int64)
        rows = [[prediction.probabilities[name] for name in self.classes] for prediction in predictions]
        return labels, np.array(rows, np.float64).reshape(-1, len(self.classes))

    def _features(self, encoder: Encoder) -> FeatureCache | None:
        """What the trunk makes of every slice, computed where missing; None where it changes, or there is no room."""
        if self.constant and encoder is not self.encoder:  # each fold may normalise by its own split
            prep, backbone = self.config.preprocessing, encoder.classifier.backbone
            model = self.config.model.model_dump(include={"name", "options", "features", "tuning"})
            settings = json.dumps([prep.model_dump(mode="json"), encoder.mean, encoder.std, model])
            cache = FeatureCache(self.slices, f"{settings} {digest_of(backbone.model)}", backbone.trunk_shape)
            missing = [case for case in self.cases if cache.find(case) is None]
            self.encoder, self.features = encoder, cache if self._fits(missing, backbone) else None
            if self.features is not None:
                self._encode(processes.mine(missing), encoder, self.features)
            processes.wait()
        return self.features  # its method `load` can be sent to loader processes

    def _fits(self, missing: Sequence[Case], backbone: Backbone) -> bool:
        """Whether what is missing takes no more than half of the free disk; of a trunk's tokens it may well."""
        needed = sum(len(self.slices.load(case)) for case in missing) * 4 * math.prod(backbone.trunk_shape)
        fits: bool = processes.agreed(not needed or needed <= shutil.disk_usage(self.slices.folder).free / 2)
        if not fits:
            self.reporter.say(f"what the frozen trunk makes of slices ({needed / 1e9:.1f} GB) is not cached: no room")
        return fits

    def _encode(self, missing: Sequence[Case], encoder: Encoder, cache: FeatureCache) -> None:
        """Compute features, many small cases at once, and keep them in the cache."""
        if missing:
            self.reporter.start("features of the frozen backbone", len(missing))
        pending: list[tuple[Case, Slices]] = []
        for number, case in enumerate(missing, 1):
            pending.append((case, self.slices.load(case)))
            if sum(len(slices) for _, slices in pending) < encoder.batch_slices and number < len(missing):
                continue
            encoded = encoder.trunk(np.concatenate([slices for _, slices in pending]))
            ends = np.cumsum([len(slices) for _, slices in pending])[:-1]
            for (done, _), features in zip(pending, np.split(encoded, ends), strict=True):
                cache.save(done, features)
                self.reporter.step("")
            pending = []
