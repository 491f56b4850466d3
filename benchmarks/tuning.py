"""What tuning beside a frozen ViT costs and gives: SynQT against full fine-tuning, LoRA and a linear probe.

    MEDVIT_REAL_DATA=/data python benchmarks/tuning.py [--runs FILE] [--quick]

Cost: bytes kept for the backward pass, processor seconds of a training step and of predicting a slice, and what learns,
of a ViT-B/16 at 224 px and of the ViT-S/14 that is trained here. Quality: each contender has the same seconds on the
same patients and is judged on the same others, out of fold, by shipped configs. Every run is a line of FILE: an
interrupted benchmark goes on there. What was fixed beforehand is in README.md.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("MEDVIT_SITE_KEY", "benchmarks")  # splits follow the hashes of patients: the same everywhere

import numpy as np
import torch
from goals import Goal
from memory import kept_bytes
from recipe_contenders import SIZE, configured
from recipe_run import Job, run
from recipe_sets import Cases, folded, head_slices, phantom, prepare_at
from recipe_tables import POWER, Runs, signed
from torch import Tensor, nn
from workers import workers

from medvit.config import Config, ModelConfig
from medvit.evaluation.metrics import Interval
from medvit.models.classifier import CtClassifier, build_classifier

FOLDS = 5


@dataclass(frozen=True)
class Way:
    """One way to tune.

    Attributes:
        config: name of the shipped config.
        epochs: on `ct_ich`, and on the phantom, so that all take about the same seconds; not of `linear`, whose
            features are kept and which is done long before.
        settings: config key -> value, over the config.
    """

    config: str
    epochs: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Way] = {
    "linear": Way("frozen", (100, 100)),
    "full": Way("baseline", (5, 60)),
    "LoRA": Way("lora", (6, 60)),
    "SynQT, P = 1": Way("synqt", (24, 60), {"model.prompts": 1}),
    "SynQT, P = 4": Way("synqt", (24, 60), {"model.prompts": 4}),
    "SynQT, P = 16": Way("synqt", (18, 60), {"model.prompts": 16}),
}
"""From simple to complex."""

SETS = {"ct_ich by slice": 0, "phantom": 1}
"""Name -> which of a way's epochs."""


@dataclass(frozen=True)
class TuningJob(Job):
    """One run of a way on a fold; `seconds` is not used."""

    def config(self, found: Cases, train: Sequence[int], weights: str) -> Config:
        """The settings of this run."""
        way = WAYS[self.contender]
        quick = self.patients > 0
        settings = {
            "model.weights": weights,
            "preprocessing.size": SIZE,
            "training.select": "last",
            **found.settings,
            "training.stages.0.epochs": 2 if quick else way.epochs[SETS[self.cases]],
            "training.threads": 1,
            "training.precision": "32-true",  # what every machine has
            "training.seed": self.round,
            **way.settings,
        }
        config = configured(way.config, settings)
        peak = config.training.stages[0].backbone_lr or config.training.stages[0].lr / 10
        return configured(way.config, settings | {"training.stages.0.backbone_lr": found.faster * peak})


def main() -> None:
    """Measure cost, run what is not in FILE yet, print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--runs", type=Path, default=Path("tuning-runs.jsonl"), help="a line per run, to go on from")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--quick", action="store_true", help="under ten minutes: one fold, 12 patients, two epochs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shared = arguments.data or (Path(os.environ["MEDVIT_REAL_DATA"]) if "MEDVIT_REAL_DATA" in os.environ else None)
    goals, costs = cost(rounds=2 if arguments.quick else 7)
    names = list(SETS) if shared else ["phantom"]
    rounds = {"ct_ich by slice": FOLDS, "phantom": 3}
    jobs = [
        TuningJob(name, way, number, 12 if arguments.quick else 0, 0)
        for name in names
        for number in range(1 if arguments.quick else rounds[name])
        for way in WAYS
    ]
    runs = Runs(arguments.runs, jobs)
    with tempfile.TemporaryDirectory() as scratch:
        work(runs, names, Path(scratch), shared, arguments.processes)
    detail = {name: compare(runs, name, jobs[0].patients) for name in names}
    for goal in goals:
        print(f"{goal.what:64}{goal.figure:10.2f}   at most {goal.high:g}{'' if goal.met else '   MISSED'}")
    result = {"name": "tuning", "figure": sum(goal.met for goal in goals), "unit": "goals met", "goal": len(goals)}
    print(json.dumps(result | {"met": all(goal.met for goal in goals), "detail": detail | {"cost": costs}}))


# ---- cost ------------------------------------------------------------------------------------------------------------

MODELS = {"ViT-B/16, 224 px": ("vit_base_patch16_224", 224), "ViT-S/14, 98 px": ("vit_small_patch14_dinov2", 98)}

ARMS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "full": ({}, False),
    "full, checkpointed": ({}, True),
    "LoRA": ({"tuning": "lora"}, False),
    "SynQT, P = 1": ({"tuning": "synqt", "prompts": 1}, False),
    "SynQT, P = 4": ({"tuning": "synqt", "prompts": 4}, False),
    "SynQT, P = 16": ({"tuning": "synqt", "prompts": 16}, False),
    "SynQT, P = 1, recomputed": ({"tuning": "synqt", "prompts": 1}, True),
    "SynQT, P = 16, recomputed": ({"tuning": "synqt", "prompts": 16}, True),
    "linear": ({"tuning": "linear"}, False),
}
"""Name -> (settings of the model, whether to compute twice and keep less)."""

LIMITS = {"SynQT, P = 1": 16, "SynQT, P = 16": 28, "SynQT, P = 1, recomputed": 9}
"""MiB a slice of the ViT-B."""

SLICES = 2

TIMES = {"step_s": "step_s", "cached_step_s": "step_s", "predict_s": "predict_s"}
"""What is shown -> as a share of what of full fine-tuning."""


def cost(rounds: int) -> tuple[list[Goal], dict[str, Any]]:
    """Tables of what each arm keeps and takes, and the goals on bytes."""
    goals, tables = [], {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for title, (name, size) in MODELS.items():
        rows = measure(name, size, rounds)
        show(title, rows)
        tables[title] = rows
        if name == "vit_base_patch16_224":
            goals = [Goal(f"{arm}: MiB kept a slice", rows[arm]["kept_mib"], 0, most) for arm, most in LIMITS.items()]
    torch.set_num_threads(threads)
    return goals, tables


def measure(name: str, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Each arm's figures; seconds are medians of rounds in which all take turns, another first each time."""
    arms = {arm: built(name, size, *settings) for arm, settings in ARMS.items()}
    slices, mask = torch.randn(SLICES, 1, 3, size, size), torch.ones(SLICES, 1, dtype=torch.bool)
    states = {}
    for arm, classifier in arms.items():
        with torch.no_grad():
            states[arm] = classifier.backbone.trunk(slices[:, 0])[:, None]
    kept = {arm: kept_bytes(one, lambda one=one: loss_of(one, slices, mask)) for arm, one in arms.items()}
    seconds: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in arms}
    names = list(arms)
    for turn in range(-1, rounds):
        for arm in names[turn % len(names) :] + names[: turn % len(names)]:
            one = arms[arm]
            cached = step_s(one, states[arm], mask) if arm.startswith(("SynQT", "linear")) else float("nan")
            figures = (step_s(one, slices, mask), cached, predict_s(one, slices, mask))
            if turn >= 0:
                seconds[arm].append(figures)
    found = {}
    for arm, one in arms.items():
        step, cached, predict = np.median(seconds[arm], axis=0) / SLICES
        found[arm] = {
            "trainable": one.parameter_counts()[0],
            "kept_mib": round(kept[arm] / SLICES / 2**20, 2),
            "step_s": round(float(step), 4),
            "cached_step_s": round(float(cached), 4),
            "predict_s": round(float(predict), 4),
        }
    return found


def built(name: str, size: int, settings: Mapping[str, Any], checkpointed: bool) -> CtClassifier:
    """A classifier in training, with random weights."""
    torch.manual_seed(0)
    config = ModelConfig(name=name, weights="none", **settings)
    classifier = build_classifier(config, size=size, channels=3, classes=2)[0]
    classifier.set_trainable("all")
    classifier.set_gradient_checkpointing(checkpointed)
    return classifier.train()


def loss_of(classifier: CtClassifier, values: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of a batch."""
    return nn.functional.cross_entropy(classifier(values, mask).logits, torch.arange(len(values)) % 2)


def step_s(classifier: CtClassifier, values: Tensor, mask: Tensor) -> float:
    """Processor seconds of forward and backward pass, in training."""
    classifier.train()
    began = time.process_time()
    loss_of(classifier, values, mask).backward()
    took = time.process_time() - began
    classifier.zero_grad()
    return took


def predict_s(classifier: CtClassifier, slices: Tensor, mask: Tensor) -> float:
    """Processor seconds of a prediction."""
    classifier.eval()
    began = time.process_time()
    with torch.inference_mode():
        classifier(slices, mask)
    return time.process_time() - began


def show(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A table in Markdown; times are ratios to full fine-tuning."""
    full = rows["full"]
    print(f"\n{title}\n\n| way | learns, M | MiB kept a slice | step, of full | cached trunk | predicting, of full |")
    print("|---|---|---|---|---|---|")
    for arm, row in rows.items():
        step, cached, predict = (row[name] / full[base] for name, base in TIMES.items())
        shown = "" if np.isnan(cached) else f"{cached:.2f}"
        counts = f"{row['trainable'] / 1e6:.2f} | {row['kept_mib']:.1f}"
        print(f"| {arm} | {counts} | {step:.2f} | {shown} | {predict:.2f} |", flush=True)


# ---- quality ---------------------------------------------------------------------------------------------------------


def work(runs: Runs, names: Sequence[str], scratch: Path, shared: Path | None, processes: int) -> None:
    """Do the runs that are missing, set by set."""
    weights = str(shared / "weights" / "vit_small_patch14_dinov2.safetensors") if shared else "none"
    with workers(processes) as pool:
        for name in names:
            if missing := runs.missing(name):
                place = scratch / name.replace(" ", "-")
                real = name != "phantom"
                found = folded(head_slices(place, shared / "data"), FOLDS) if real else phantom(place, None)
                prepare_at(SIZE, found.cases, found.cache, found.settings)
                print(f"\n{name}: {len(found.cases)} cases; {len(missing)} runs", flush=True)
                for future in as_completed([pool.submit(run, job, found, weights) for job in missing]):
                    row = future.result()
                    runs.add(row)
                    print(f"  {row['contender']}, fold {row['round']}: {row['trained_s']:.0f} s", flush=True)


def compare(runs: Runs, name: str, patients: int) -> dict[str, Any]:
    """AUROC of each way, and paired differences of SynQT to the others; patients resampled."""
    judged = {way: runs.judged(name, way, patients) for way in WAYS}
    print(f"\n{name}\n\n| way | AUROC | within sex | seconds a fold | predicting, s |\n|---|---|---|---|---|")
    for way, one in judged.items():
        within = one.auroc(np.char.add(one.rounds, one.sexes))
        predicted = np.median([row["predicted_s"] for row in runs.rows.values() if _of(row, name, way, patients)])
        print(f"| {way} | {one.auroc()} | {within} | {np.median(one.trained_s):.0f} | {predicted:.1f} |")
    print("\n| paired difference | to linear | to LoRA | to full | detectable |\n|---|---|---|---|---|")
    detail: dict[str, Any] = {way: three(one.auroc()) for way, one in judged.items()}
    for way in WAYS:
        if way.startswith("SynQT"):
            gaps = {other: judged[way].minus(judged[other]) for other in ("linear", "LoRA", "full")}
            seen = max(POWER * gap.half_width for gap in gaps.values())
            print(f"| {way} | {' | '.join(map(signed, gaps.values()))} | {seen:.3f} |")
            detail[f"{way} minus"] = {other: three(gap) for other, gap in gaps.items()}
    return detail


def _of(row: Mapping[str, Any], name: str, way: str, patients: int) -> bool:
    return (row["cases"], row["contender"], row["patients"]) == (name, way, patients)


def three(interval: Interval) -> list[float]:
    """Point and ends, rounded."""
    return [round(value, 3) for value in (interval.point, interval.low, interval.high)]


if __name__ == "__main__":
    sys.exit(main())
