"""One run of `pretraining.py`: a small ViT learns without labels for so many seconds, and labels judge what it sees."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
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

from medvit.config import AccelerationConfig, AccelerationStep, ModelConfig, ObjectiveConfig, PretrainingConfig, Stage
from medvit.evaluation.online import neighbour_votes
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.compression import Compression
from medvit.objectives import Objective, Task, build_objective
from medvit.objectives.acceleration import sparing
from medvit.training.collapse import examine
from medvit.training.optimizer import course, parameter_groups

BATCH = 48
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
LARGER = 2
"""Sides of large patches over the model's own."""

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


def relaxing(patch: int) -> AccelerationConfig:
    """Large patches, half of them at first; all of the model's own in the end. A teacher sees as little."""
    large = LARGER * patch
    steps = (
        AccelerationStep(from_progress=0.0, keep=0.5, patch=large),
        AccelerationStep(from_progress=0.3, patch=large),
        AccelerationStep(from_progress=0.85),
    )
    return AccelerationConfig(schedule=steps, symmetric=True)


STRATEGIES = ("uncompressed", "constant", "relaxing")
"""`constant`: large patches throughout."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        cases: name of the set.
        objective: name.
        strategy: one of `STRATEGIES`.
        share: of the set's seconds that it may use; 0: the untrained encoder.
        seed: of weights, order and dropped tokens.
    """

    cases: str
    objective: str
    strategy: str
    share: float
    seed: int


def small_vit(pictures: Pictures, seed: int) -> CtClassifier:
    """With random weights."""
    torch.manual_seed(seed)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=SMALL | {"patch_size": pictures.patch})
    return build_classifier(config, size=pictures.size, channels=pictures.channels, classes=2)[0]


def build(job: Job, pictures: Pictures) -> Objective:
    """The objective, with random weights."""
    acceleration = relaxing(pictures.patch) if job.strategy == "relaxing" else None
    pretraining = SETTINGS[job.objective]
    settings = ObjectiveConfig(name=job.objective, pretraining=pretraining, acceleration=acceleration)
    objective = build_objective(small_vit(pictures, job.seed), settings, Task(()))
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


def pretrain(job: Job, pictures: Pictures, seconds: float) -> tuple[Objective, dict[str, Any]]:
    """Train for about so many processor seconds; the number of steps is settled beforehand, by steps timed here."""
    steps = settle(job, pictures, seconds)
    objective, rate = build(job, pictures), RATES[job.objective][job.cases != "digits"]
    stage = Stage(lr=rate, backbone_lr=rate, warmup=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(objective, stage), fused=True)
    factor, peaks = course(stage, steps), [group["lr"] for group in optimizer.param_groups]
    feed, used, loss = batches(pictures, job.seed, local=job.objective == "dino"), 0.0, float("nan")
    torch.manual_seed(1000 + job.seed)
    for step in range(steps):
        batch = next(feed)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        began = time.process_time()
        loss = take_step(job, objective, batch, step / steps, pictures.patch)
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()
        used += time.process_time() - began
    return objective, {"steps": steps, "seconds": round(used, 2), "loss": round(loss, 4)}


def take_step(job: Job, objective: Objective, batch: dict[str, Tensor], progress: float, patch: int) -> float:
    """Leave the clipped gradient of a batch in the parameters; the loss."""
    large = Compression(patch=LARGER * patch)
    constant = job.strategy == "constant"
    with sparing(objective, large, symmetric=True) if constant else nullcontext():
        loss = objective({**batch, "totals": objective.totals(batch)}, progress)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], 1.0)
    return float(loss.detach())


def settle(job: Job, pictures: Pictures, seconds: float) -> int:
    """Steps that take so many processor seconds: those of each part of the schedule are timed."""
    objective = build(job, pictures)
    feed = batches(pictures, 0, local=job.objective == "dino")
    schedule = relaxing(pictures.patch).schedule if job.strategy == "relaxing" else ()
    begins = [step.from_progress for step in schedule] or [0.0]
    mean = 0.0
    for begin, end in zip(begins, [*begins[1:], 1.0], strict=True):
        took = []
        for _ in range(4):
            batch = next(feed)
            began = time.process_time()
            take_step(job, objective, batch, begin, pictures.patch)
            objective.after_step()
            took.append(time.process_time() - began)
            objective.zero_grad()
        mean += (end - begin) * float(np.median(took[1:]))
    return max(10, round(seconds / mean))


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
