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

from medvit.config import ModelConfig, ObjectiveConfig, PretrainingConfig, Stage
from medvit.evaluation.online import neighbour_votes
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.compression import NONE, Compression
from medvit.objectives import Objective, Task, build_objective
from medvit.objectives.acceleration import sparing
from medvit.training.collapse import examine
from medvit.training.optimizer import course, parameter_groups

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


STRATEGIES: Mapping[str, tuple[tuple[float, Compression], ...]] = {
    "uncompressed": ((0.0, NONE),),
    "constant": ((0.0, Compression(patch=LARGER)),),
    "relaxing": ((0.0, Compression(0.5, LARGER)), (0.3, Compression(patch=LARGER)), (0.85, NONE)),
}
"""Name -> from which progress on how little is seen, patches in sides of the model's own; a teacher sees as little."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        cases: name of the set.
        objective: name.
        strategy: one of `STRATEGIES`.
        share: of the set's compute that it may use; 0: the untrained encoder.
        steps: that this is, at the prices of each step.
        seed: of weights, order and dropped tokens.
    """

    cases: str
    objective: str
    strategy: str
    share: float
    steps: int
    seed: int


def small_vit(pictures: Pictures, seed: int) -> CtClassifier:
    """With random weights."""
    torch.manual_seed(seed)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=SMALL | {"patch_size": pictures.patch})
    return build_classifier(config, size=pictures.size, channels=pictures.channels, classes=2)[0]


def build(name: str, pictures: Pictures, seed: int) -> Objective:
    """An objective with random weights."""
    settings = ObjectiveConfig(name=name, pretraining=SETTINGS[name])
    objective = build_objective(small_vit(pictures, seed), settings, Task(()))
    objective.set_trainable("all", 1)
    return objective.train()


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


class Learning:
    """An objective under way.

    Args:
        job: what is learned; its seed is that of all that is random.
        pictures: of its set.
    """

    def __init__(self, job: Job, pictures: Pictures) -> None:
        self.job, self.patch = job, pictures.patch
        self.objective = build(job.objective, pictures, job.seed)
        rate = RATES[job.objective][job.cases != "digits"]
        stage = Stage(lr=rate, backbone_lr=rate, warmup=0.1)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.objective, stage), fused=True)
        self.factor, self.peaks = course(stage, job.steps), [group["lr"] for group in self.optimizer.param_groups]
        self.feed = batches(pictures, job.seed, local=job.objective == "dino")

    def step(self, number: int, seen: Compression) -> float:
        """Take a step, whose batch is drawn beforehand; returns its processor seconds."""
        batch, objective = next(self.feed), self.objective
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(number)
        patch = None if seen.patch is None else seen.patch * self.patch
        began = time.process_time()
        with sparing(objective, Compression(seen.keep, patch), symmetric=True):
            loss = objective({**batch, "totals": objective.totals(batch)}, number / self.job.steps)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        objective.after_step()
        return time.process_time() - began


def pretrain(job: Job, pictures: Pictures) -> tuple[Objective, dict[str, Any]]:
    """Take the steps of a job; what was learned, and the processor seconds that it took."""
    learning, used = Learning(job, pictures), 0.0
    torch.manual_seed(1000 + job.seed)
    for number in range(job.steps):
        used += learning.step(number, seen_at(job.strategy, number / job.steps))
    return learning.objective, {"seconds": round(used, 2)}


def seen_at(strategy: str, progress: float) -> Compression:
    """How little is seen at a progress of 0..1."""
    return [seen for begin, seen in STRATEGIES[strategy] if progress >= begin][-1]


def price(name: str, cases: str, pictures: Pictures, rounds: int = 15) -> dict[str, float]:
    """Strategy -> processor seconds of a step, on average over its schedule: the unit of compute.

    Medians of rounds in which all that is seen takes turns, after two that do not count: whatever else the machine does
    meets all alike. One price is for all seeds.
    """
    learning = Learning(Job(cases, name, "uncompressed", 1.0, 1000, 0), pictures)
    possible = STRATEGIES if learning.objective.patches_vary else ["uncompressed"]
    strategies = {strategy: STRATEGIES[strategy] for strategy in possible}
    kinds = list(dict.fromkeys(seen for parts in strategies.values() for _, seen in parts))
    seconds = np.array([[learning.step(turn, seen) for seen in kinds] for turn in range(-2, rounds)])[2:]
    each = dict(zip(kinds, np.median(seconds, axis=0), strict=True))
    found = {}
    for strategy, parts in strategies.items():
        ends = [begin for begin, _ in parts[1:]] + [1.0]
        found[strategy] = float(sum((end - begin) * each[seen] for (begin, seen), end in zip(parts, ends, strict=True)))
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
