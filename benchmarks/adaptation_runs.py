"""One run of `adaptation.py`: a problem, a method and a seed -> what became of source and target.

A run is a function of its `Settings` alone, so that a benchmark that was interrupted goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import adaptation_problems
import numpy as np
import torch
from adaptation_problems import Cases, Labels, Problem, Values, digits, phantom_sites, together, two_makers

from medvit.config import ObjectiveConfig, Stage, TrainingConfig
from medvit.data.dataset import CaseDataset
from medvit.models.classifier import CtClassifier
from medvit.objectives import OBJECTIVES, Objective, Task
from medvit.objectives.objective import UNLABELLED
from medvit.records import Case
from medvit.training import fit
from medvit.training.adaptation import information, probe
from medvit.training.loop import Run

Part = Literal["digits", "phantom", "ct"]

DEFAULTS = {"source": 0.0, "oracle": 0.0, "dann": 1.0, "cdan": 1.0, "mmd": 0.1}
STRENGTH: dict[Part, dict[str, float]] = {
    "digits": DEFAULTS,
    "phantom": DEFAULTS | {"dann": 0.3, "cdan": 0.3},
    "ct": DEFAULTS,
}
"""Method -> weight of the adaptation, the same for every seed: the defaults of the configuration, but for the phantom,
where a pilot lost its classes to a strength of 1."""

DECISIVE: dict[Part, tuple[str, ...]] = {
    "digits": ("DIGITS", "DIGIT_PX", "DIGIT_PATCH", "VARIANTS", "SMALL"),
    "phantom": (
        *("PHANTOM", "PHANTOM_PX", "PHANTOM_PATCH", "PHANTOM_SLICES", "PHANTOM_DRAWS", "PHANTOM_WINDOW"),
        *("TARGET_SITE", "PLACES", "SMALL"),
    ),
    "ct": ("CT_PX", "CT_CUT"),
}
"""What of `adaptation_problems` decides a part."""

FIRST = {"lr": 1e-3, "backbone_lr": 1e-3}
"""Rates of the small models while they learn the labelled source from scratch, before any method comes in."""

FIRST_TIMES: dict[Part, float] = {"digits": 2, "phantom": 0.5, "ct": 0}
"""For how many times the method's epochs; 0: the model is pretrained already."""

THEN: dict[Part, dict[str, float]] = {
    "digits": {"lr": 1e-2, "backbone_lr": 3e-4},
    "phantom": {"lr": 1e-3, "backbone_lr": 3e-4},
    "ct": {"lr": 1e-3, "backbone_lr": 3e-5},
}
"""Rates of what follows, for all methods: of the head, and of the backbone. Chosen on seeds of
their own (README.md)."""

HASTE: dict[Part, float] = {"digits": 1.0, "phantom": 10.0, "ct": 10.0}
"""How many times as fast as the head of classes the discriminator learns."""

AVERAGED: dict[Part, float] = {"phantom": 0.98}
"""Decay of the moving average of weights that is judged, where there is one: opponents circle each other."""


@dataclass(frozen=True)
class Settings:
    """What decides a run.

    Attributes:
        part: digits, phantom or ct.
        problem: of the part.
        method: source (alone), dann, cdan, mmd, or oracle (which is given the target's training labels).
        seed: of cases, weights and order.
        strength: weight of the adaptation.
        epochs: of the method, through the labelled source (ct: of the last stage).
        batch: labelled source cases per step; those of the target come on top of them.
    """

    part: Part
    problem: str
    method: str
    seed: int
    strength: float
    epochs: int
    batch: int


def first_stages(settings: Settings) -> tuple[Stage, ...]:
    """The source alone, the same for all methods; none for a model that is pretrained already."""
    times = FIRST_TIMES[settings.part]
    return (Stage(epochs=round(times * settings.epochs), **FIRST),) if times else ()


def stages(settings: Settings) -> tuple[Stage, ...]:
    """What each method then does; with the pretrained model as configs/dann.yaml does it."""
    rates = THEN[settings.part]
    if settings.part != "ct":
        return (Stage(epochs=settings.epochs, **rates),)
    head = Stage(name="head", trainable="head", epochs=3, lr=rates["lr"])
    return head, Stage(name="top", trainable="top", blocks=3, epochs=settings.epochs, **rates)


def design(settings: Settings) -> str:
    """Short digest of all that the settings take for granted: rows of another design are of another experiment."""
    told = [getattr(adaptation_problems, name) for name in DECISIVE[settings.part]]
    told += [HASTE[settings.part], AVERAGED.get(settings.part)]
    dumped = [stage.model_dump() for stage in first_stages(settings) + stages(settings)]
    return hashlib.sha256(repr((told, dumped)).encode()).hexdigest()[:12]


@lru_cache(maxsize=2)
def problem_of(part: Part, name: str, seed: int, shared: Path) -> Problem:
    """The cases; kept for the methods that come next."""
    if part == "digits":
        return digits(shared / "data", name, seed)
    if part == "phantom":
        return phantom_sites(seed)
    return two_makers(shared / "data", shared / "weights" / "vit_small_patch14_dinov2.safetensors")


def run(settings: Settings, shared: Path) -> dict[str, Any]:
    """Train and judge.

    Returns:
        `target` and `source` (held-out figures of merit), `information` (of predictions on the unlabelled target),
        `probe` and `mmd` (what still tells the sites apart), `domain_accuracy` (of the training's own discriminator),
        `scores` (p of the last class of each target case, where there are few), and `seconds`.
    """
    began = time.perf_counter()
    problem = problem_of(settings.part, settings.problem, settings.seed, shared)
    classifier = _begun(settings, shared)
    objective, cases, labels, batch = _method(classifier, problem, settings)
    last = _fit(objective, dataset_of(cases, labels, problem.draws, settings.seed), stages(settings), batch, settings)
    found = _judge(classifier, problem) | {"domain_accuracy": last.get("domain_accuracy")}
    return found | {"loss": last["loss"], "seconds": round(time.perf_counter() - began, 1)}


def _begun(settings: Settings, shared: Path) -> CtClassifier:
    """A classifier that has learned the source alone, a new copy for each method."""
    start = replace(settings, method="source", strength=0.0)
    return copy.deepcopy(_learned(start, shared))


@lru_cache(maxsize=1)
def _learned(start: Settings, shared: Path) -> CtClassifier:
    problem = problem_of(start.part, start.problem, start.seed, shared)
    torch.manual_seed(start.seed)
    classifier = problem.build()
    if first := first_stages(start):
        objective, cases, labels, batch = _method(classifier, problem, start)
        _fit(objective, dataset_of(cases, labels, problem.draws, start.seed), first, batch, start)
    return classifier


def _method(classifier: CtClassifier, problem: Problem, settings: Settings) -> tuple[Objective, Cases, Labels, int]:
    """Objective, training cases, their labels (negative: none), and labelled cases per step: as many steps for all."""
    parts, labels, batch = [problem.source], [problem.source.labels], settings.batch
    if settings.method != "source":
        parts.append(problem.target)
    if settings.method == "oracle":  # all are labelled: the batch holds both sites as those of adaptation do
        labels.append(problem.target.labels)
        batch = math.ceil(batch * (1 + len(problem.target) / len(problem.source)))
    elif settings.method != "source":
        labels.append(np.full(len(problem.target), UNLABELLED))
    cases = together(*parts)
    name = settings.method if settings.method in ("dann", "cdan", "mmd") else "supervised"
    config = ObjectiveConfig(
        name=name, strength=settings.strength, class_weights=False, discriminator_rate=HASTE[settings.part]
    )
    task = Task(tuple(np.bincount(problem.source.labels).tolist()), len(np.unique(cases.sites)))
    torch.manual_seed(settings.seed)  # of the discriminator
    return OBJECTIVES[name](classifier, config, task), cases, np.concatenate(labels), batch


def _fit(
    objective: Objective, dataset: CaseDataset, stages: tuple[Stage, ...], batch: int, settings: Settings
) -> dict[str, Any]:
    """The row of metrics of the last epoch, whose weights are kept."""
    config = TrainingConfig(
        stages=stages,
        batch_size=batch,
        select="last",
        checkpoint_minutes=60,
        threads=torch.get_num_threads(),
        device="cpu",
        seed=settings.seed,
        ema=AVERAGED.get(settings.part, 0.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        history = fit(objective, dataset, config, lambda: {"auroc": 0.5, "loss": 0.0}, Run(folder=Path(folder)))
    return history.rows[-1]


def dataset_of(cases: Cases, labels: Labels, draws: int, seed: int) -> CaseDataset:
    """Ready values: nothing is read and nothing random precedes the model."""
    records = [
        Case(case_id=str(i), patient_id=str(i), group=str(i), root="", files=(str(i),)) for i in range(len(cases))
    ]
    return CaseDataset(
        records,
        lambda case: cases.values[int(case.files[0])],
        labels,
        slices=draws,
        transform=None,
        seed=seed,
        domains=cases.sites,
    )


def _judge(classifier: CtClassifier, problem: Problem) -> dict[str, Any]:
    """On cases that were not trained on; the information on those that were, without labels."""
    blind, _ = look(classifier, problem.target, problem.shown)
    probabilities, target = look(classifier, problem.target_judged, problem.shown)
    held_out = problem.source_judged if len(problem.source_judged) else problem.source
    at_source, source = look(classifier, held_out, problem.shown)
    patients = np.concatenate(
        [np.char.add(f"{n}", held.patients) for n, held in enumerate((held_out, problem.target_judged))]
    )
    apart = probe(source, target, patients)
    return {
        "target": problem.score(problem.target_judged.labels, probabilities),
        "source": problem.score(held_out.labels, at_source) if held_out is problem.source_judged else None,
        "information": information(blind.astype(np.float64)),
        "probe": apart.accuracy,
        "mmd": apart.mmd,
        "scores": probabilities[:, -1].round(5).tolist() if len(target) < 100 else None,
    }


def look(classifier: CtClassifier, cases: Cases, shown: int) -> tuple[Values, Values]:
    """Probabilities (N, K) and pooled features (N, D), from the first `shown` slices of each."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(cases), 128):
            values = torch.from_numpy(cases.values[start : start + 128, :shown])
            output = classifier(values, torch.ones(values.shape[:2], dtype=torch.bool))
            found.append((output.logits.softmax(dim=1), output.pooled))
    probabilities, pooled = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return probabilities, pooled
