"""One run of `pretraining.py`: a small ViT learns without labels for so many steps, and labels judge what it sees."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from pretraining_sets import Pictures
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from medvit.config import AccelerationStep, ModelConfig, ObjectiveConfig, PretrainingConfig, Stage, TrainingConfig
from medvit.evaluation.online import neighbour_votes
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.compression import Compression
from medvit.objectives import Objective, Task, build_objective
from medvit.objectives.acceleration import compression_at, compression_of, sparing
from medvit.training.collapse import examine
from medvit.training.device import make_fabric
from medvit.training.stage import StageTraining
from medvit.training.step import MicroBatch, seed_for

BATCH = 48
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
LARGER = 2

SETTINGS: Mapping[str, PretrainingConfig] = {
    "simclr": PretrainingConfig(temperature=0.2, hidden=256, width=64),
    "mocov3": PretrainingConfig(temperature=0.2, hidden=256, width=64, momentum=0.99),
    "dino": PretrainingConfig(temperature=0.1, hidden=256, width=64, prototypes=512, momentum=0.99),
    "mae": PretrainingConfig(decoder_width=64, decoder_depth=1),
}

RATES: Mapping[str, tuple[float, float]] = {
    "simclr": (5e-3, 2e-3),
    "mocov3": (5e-3, 2e-3),
    "dino": (2e-3, 1e-3),
    "mae": (2e-3, 2e-3),
}
"""Objective -> peak learning rate on digits, and on CT."""


STRATEGIES = ("uncompressed", "constant", "relaxing")

LOOP = TrainingConfig(threads=1, device="cpu", precision="32-true")  # what every machine has


def schedule(strategy: str, patch: int) -> tuple[AccelerationStep, ...]:
    """How little a strategy sees, and until when, of a model whose own patch is so many px; its teacher likewise."""
    large = LARGER * patch
    return {
        "uncompressed": (AccelerationStep(from_progress=0.0),),
        "constant": (AccelerationStep(from_progress=0.0, patch=large),),
        "relaxing": (
            AccelerationStep(from_progress=0.0, keep=0.5, patch=large),
            AccelerationStep(from_progress=0.3, patch=large),
            AccelerationStep(from_progress=0.85),
        ),
    }[strategy]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        cases: name of the set.
        objective: name.
        strategy: one of `STRATEGIES`.
        share: of the set's compute that it may use; 0: the untrained encoder.
        steps: that this is, at the prices of each step.
        draws: of few labelled patients, on which what was learned is tuned.
        seed: of weights, order and dropped tokens.
    """

    cases: str
    objective: str
    strategy: str
    share: float
    steps: int
    draws: int
    seed: int


def small_vit(pictures: Pictures, seed: int) -> CtClassifier:
    """With random weights."""
    torch.manual_seed(seed)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=SMALL | {"patch_size": pictures.patch})
    return build_classifier(config, size=pictures.size, channels=pictures.channels, classes=2)[0]


def build(name: str, pictures: Pictures, seed: int) -> Objective:
    """An objective with random weights."""
    settings = ObjectiveConfig(name=name, pretraining=SETTINGS[name])
    return build_objective(small_vit(pictures, seed), settings, Task(()))


def batches(pictures: Pictures, seed: int, *, local: bool) -> Iterator[dict[str, Tensor]]:
    """Without end: each epoch in an order of its own."""
    patients = torch.from_numpy(pictures.patients[pictures.learned])
    for epoch in count():
        views, small = pictures.views(epoch), pictures.local(epoch) if local else None
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(patients)))
        for chosen in order.split(BATCH)[: len(order) // BATCH]:
            batch = {
                "input": views[chosen][:, None].float(),
                "mask": torch.ones(len(chosen), 1, dtype=torch.bool),
                "patient": patients[chosen],
                "label": torch.zeros(len(chosen), dtype=torch.int64),
                "domain": torch.zeros(len(chosen), dtype=torch.int64),
                "index": chosen,
            }
            yield batch if small is None else {**batch, "local": small[chosen][:, None].float()}


class Descent:
    """Steps of an objective down its loss, as medvit's loop takes them.

    Args:
        objective: what is trained.
        stage: rates.
        steps: in all.
        seed: of what is random in them.
    """

    def __init__(self, objective: Objective, stage: Stage, steps: int, seed: int) -> None:
        self.steps, self.seed = steps, seed
        objective.set_trainable(stage.trainable, stage.blocks)
        objective.train()
        self.training = StageTraining(make_fabric(LOOP), objective, stage.model_copy(update={"epochs": 1}), LOOP, steps)

    def take(self, number: int, batch: dict[str, Tensor]) -> None:
        """Take one."""
        self.training.set_rates(number)
        micro = MicroBatch(batch, progress=number / self.steps, seed=seed_for(self.seed, 0, number, 0))
        self.training.gradient([micro], due=False)
        self.training.move(skip=False)


class Learning:
    """An objective under way.

    Args:
        job: what is learned; its seed is that of all that is random.
        pictures: of its set.
    """

    def __init__(self, job: Job, pictures: Pictures) -> None:
        self.objective = build(job.objective, pictures, job.seed)
        rate = RATES[job.objective][job.cases != "digits"]
        self.descent = Descent(self.objective, Stage(lr=rate, backbone_lr=rate, warmup=0.1), job.steps, job.seed)
        self.feed = batches(pictures, job.seed, local=job.objective == "dino")

    def step(self, number: int, seen: Compression) -> float:
        """Take a step, whose batch is drawn beforehand; returns its processor seconds."""
        batch = next(self.feed)
        began = time.process_time()
        with sparing(self.objective, seen, symmetric=True):
            self.descent.take(number, batch)
        return time.process_time() - began


def pretrain(job: Job, pictures: Pictures) -> tuple[Objective, float]:
    """Take the steps of a job; what was learned, and the processor seconds that it took."""
    learning, steps = Learning(job, pictures), schedule(job.strategy, pictures.patch)
    used = [learning.step(number, compression_at(steps, number / job.steps)) for number in range(job.steps)]
    return learning.objective, sum(used)


def price(name: str, cases: str, pictures: Pictures, rounds: int = 15) -> dict[str, float]:
    """Strategy -> processor seconds of a step, on average over its schedule: the unit of compute.

    Medians of rounds in which all that is seen takes turns, after two that do not count: whatever else the machine does
    meets all alike. One price is for all seeds.
    """
    learning = Learning(Job(cases, name, "uncompressed", 1.0, 1000, 0, 0), pictures)
    possible = STRATEGIES if learning.objective.patches_vary else STRATEGIES[:1]
    schedules = {strategy: schedule(strategy, pictures.patch) for strategy in possible}
    kinds = list(dict.fromkeys(compression_of(step) for steps in schedules.values() for step in steps))
    seconds = np.array([[learning.step(turn, seen) for seen in kinds] for turn in range(rounds + 2)])[2:]
    each = dict(zip(kinds, np.median(seconds, axis=0), strict=True))
    found = {}
    for strategy, steps in schedules.items():
        ends = [step.from_progress for step in steps[1:]] + [1.0]
        spans = [(end - step.from_progress, compression_of(step)) for step, end in zip(steps, ends, strict=True)]
        found[strategy] = float(sum(span * each[seen] for span, seen in spans))
    return found


def judge(objective: Objective, pictures: Pictures) -> dict[str, float]:
    """Balanced accuracy of neighbours' votes and of a linear probe, and its AUROC where there are two classes.

    Slices that were learned from are the bank, the others are asked.
    """
    features, learned, labels = encode(objective, pictures.plain()), pictures.learned, pictures.labels
    bank, asked, known, truth = features[learned], features[~learned], labels[learned], labels[~learned]
    probe = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced")).fit(bank, known)
    found = {
        "knn": balanced_accuracy_score(truth, neighbour_votes(bank, known, asked).argmax(axis=1)),
        "probe": balanced_accuracy_score(truth, probe.predict(asked)),
    }
    if labels.max() == 1:
        found["auroc"] = roc_auc_score(truth, probe.decision_function(asked))
    health = examine(asked)
    found |= {"rank": health.rank, "spread": health.spread, "collapsed": float(health.collapsed)}
    return {name: round(float(value), 4) for name, value in found.items()}


def encode(objective: Objective, slices: Tensor) -> Any:
    """(N, C, H, W) -> (N, D)."""
    backbone = objective.encoder().eval()
    with torch.inference_mode():
        return torch.cat([backbone(some) for some in slices.split(512)]).numpy()
