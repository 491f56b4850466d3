"""Do scores of frozen features put pretrained weights in the order that fine-tuning finds?

    MEDVIT_REAL_DATA=/data python benchmarks/rank.py [--quick]

Candidates whose worth is known in advance: pretrained weights of a ViT-S/14, the same mixed with random ones to 25, 50
and 75 %, and random ones. In three patient-grouped rounds each is scored on the training patients, as medvit-rank does
it, then fine-tuned on them (last blocks and head), and judged on the others. What was fixed beforehand is in README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MEDVIT_SITE_KEY", "benchmarks")  # splits follow the hashes of patients: the same everywhere

import numpy as np
import numpy.typing as npt
import torch
from recipe_contenders import SIZE, configured
from recipe_sets import JUDGE, ROUNDS, SETS, STEP, Cases, prepare_at
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau
from workers import alone

from medvit import training
from medvit.config import Config, ModelConfig
from medvit.evaluation.bootstrap import PatientBootstrap, percentile_interval
from medvit.evaluation.candidates import Candidate, see_cases
from medvit.evaluation.metrics import Interval, weighted_auroc
from medvit.evaluation.probe import linear_probe, nearest_neighbour
from medvit.evaluation.transfer import h_score, logme
from medvit.models.backbone import build_backbone
from medvit.training.material import Material

Floats = npt.NDArray[np.float64]

DAMAGE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Share of random weights in each candidate: from pretrained to random."""

EPOCHS: Mapping[str, int] = {"siim_ct_100": 12, "ct_ich by slice": 4}
"""Of fine-tuning, for a thousand slices or so; by study nothing is learned in this time (see recipe.py)."""

GOAL = 0.6
"""Kendall's tau of the linear probe on every set: 8 of 10 pairs of candidates in order."""

SCORES: Mapping[str, Callable[[Any, Any, Any], float]] = {
    "linear probe": lambda features, labels, groups: linear_probe(features, labels, groups).point,
    "1-NN": nearest_neighbour,
    "LogME": lambda features, labels, _: logme(features, labels),
    "H-score": lambda features, labels, _: h_score(features, labels),
}
"""Features (N, D), labels, patients (N,) -> score, higher is better. These weights bring no classifier for LEEP."""


@dataclass(frozen=True)
class Outcome:
    """One candidate in one round: `scores` of its training cases by name; `judged` (n,) probabilities of the others."""

    scores: dict[str, float]
    judged: Floats


def candidates(weights: Path, folder: Path) -> dict[str, Path]:
    """Write the damaged weights; name -> file."""
    good = {name: value.float() for name, value in load_file(weights).items()}
    torch.manual_seed(0)
    native = round((good["pos_embed"].shape[1] - 1) ** 0.5) * 14  # px at which no position has to be resampled
    random = build_backbone(ModelConfig(weights="none"), size=native, channels=3)[0].model.state_dict()
    files = {}
    for share in DAMAGE:
        name = {0.0: "pretrained", 1.0: "random"}.get(share, f"{share:.0%} random")
        files[name] = folder / f"{share:.2f}.safetensors"
        mixed = {key: ((1 - share) * value + share * random[key]).contiguous() for key, value in good.items()}
        save_file(mixed, files[name])
    return files


def settings(found: Cases, weights: Path, epochs: int, number: int) -> Config:
    """The recipe, the same for all candidates: the shipped baseline on the last blocks and the head."""
    stage = {"trainable": "top", "epochs": epochs}
    wanted = {
        **found.settings,
        **{f"training.stages.0.{key}": value for key, value in stage.items()},
        "model.weights": weights,
        "preprocessing.size": SIZE,
        "training.batch_size": STEP,
        "training.select": "last",
        "training.threads": 1,
        "training.precision": "32-true",
        "training.seed": number,
    }
    return configured("baseline", wanted)


def compete(found: Cases, weights: Path, epochs: int, number: int) -> Outcome:
    """Score, fine-tune and judge one candidate in one round."""
    config, (train, test) = settings(found, weights, epochs, number), found.rounds[number]
    slices = prepare_at(SIZE, found.cases, found.cache, found.settings)
    learners = [found.cases[index] for index in train]
    sight = see_cases(Candidate(weights.stem, config.model), config, learners, slices.load)
    labels, groups = (np.array(column) for column in zip(*[(one.label, one.group) for one in learners], strict=True))
    scores = {name: score(sight.features, labels, groups) for name, score in SCORES.items()}
    with tempfile.TemporaryDirectory() as folder:
        experiment = training.Experiment(config, learners, found.classes, slices, Path(folder), JUDGE)
        model = experiment.refit(epochs)
    material = Material(config, [found.cases[index] for index in test], found.classes, slices)
    predictions = material.predict(model, np.arange(len(test)))
    return Outcome(scores, np.array([one.probabilities[found.classes[-1]] for one in predictions]))


def report(name: str, found: Cases, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Print both tables of a set; its figures. Of each candidate there is an outcome per round."""
    judged = np.concatenate([test for _, test in found.rounds])
    rounds = np.repeat(np.arange(len(found.rounds)), [len(test) for _, test in found.rounds])
    cases = [found.cases[index] for index in judged]
    truth = np.array([case.label == found.classes[-1] for case in cases])
    bootstrap = PatientBootstrap(np.array([case.group for case in cases]))
    guesses = [np.concatenate([one.judged for one in each]) for each in outcomes.values()]

    def aurocs(weights: Floats) -> Floats:
        """(D, N) -> (D, candidates)."""
        return np.stack([weighted_auroc(truth, guess, weights, rounds) for guess in guesses], axis=1)

    points, draws = bootstrap.apply(aurocs)

    def interval(of: Callable[[Floats], float]) -> Interval:
        return percentile_interval(of(points), np.array([of(row) for row in draws]), 0.95)

    tuned = [interval(lambda row, place=place: float(row[place])) for place in range(len(outcomes))]
    scores = {
        kind: np.array([np.mean([one.scores[kind] for one in each]) for each in outcomes.values()]) for kind in SCORES
    }
    print(f"\n{name}: {len(truth)} cases of {len(np.unique(bootstrap.patients))} patients, AUROC within rounds")
    print(f"| weights | fine-tuned AUROC | {' | '.join(SCORES)} |\n|---|---|{'---|' * len(SCORES)}")
    for place, candidate in enumerate(outcomes):
        print(f"| {candidate} | {tuned[place]} | {' | '.join(f'{one[place]:.3f}' for one in scores.values())} |")
    print("\n| score | Kendall's tau | regret of its first choice |\n|---|---|---|")
    told: dict[str, Any] = {"auroc": dict(zip(outcomes, points.tolist(), strict=True))}
    for kind, values in scores.items():
        best = int(values.argmax())
        tau = interval(lambda row, values=values: float(kendalltau(values, row).statistic))
        regret = interval(lambda row, best=best: float(row.max() - row[best]))
        print(f"| {kind} | {tau} | {regret} |")
        told[kind] = {"scores": values.tolist(), "tau": vars(tau), "regret": vars(regret)}
    return told


def main() -> None:
    """All sets, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--quick", action="store_true", help="under ten minutes: contrast only")
    arguments = parser.parse_args()
    shared = arguments.data or Path(os.environ.get("MEDVIT_REAL_DATA", "."))
    weights = shared / "weights" / "vit_small_patch14_dinov2.safetensors"
    if not weights.is_file():
        raise SystemExit("there are no weights to rank: give --data or MEDVIT_REAL_DATA")
    detail: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        files = candidates(weights, Path(scratch))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context, initializer=quiet) as pool:
            for name in list(EPOCHS)[: 1 if arguments.quick else None]:
                found = SETS[name](Path(scratch) / name.replace(" ", "-"), shared / "data")
                prepare_at(SIZE, found.cases, found.cache, found.settings)  # once, not in each process
                jobs = {
                    one: [pool.submit(compete, found, file, EPOCHS[name], number) for number in range(ROUNDS)]
                    for one, file in files.items()
                }
                detail[name] = report(name, found, {one: [job.result() for job in each] for one, each in jobs.items()})
                print(f"\n{time.monotonic() - began:.0f} s so far", flush=True)
    figure = min(told["linear probe"]["tau"]["point"] for told in detail.values())
    result = {"name": "rank", "figure": figure, "unit": "Kendall's tau of the linear probe, worst set", "goal": GOAL}
    print(json.dumps({**result, "met": figure >= GOAL, "detail": detail}))


def quiet() -> None:
    """One thread for each process, and no warnings of libraries."""
    alone()
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
