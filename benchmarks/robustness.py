"""How AUROC falls with the severity of each corruption and attack on real CT, and what it costs to know.

    python benchmarks/robustness.py [--data FOLDER] [--minutes M] [--pictures FOLDER]

Contrast agent on `siim_ct_100`, frozen DINOv2-derived ViT-S/14 at 126 px, five patient-grouped folds: every case is
judged by the model of its own fold. Costs are of one changed picture against one clean prediction, in alternation; FGSM
and PGD are compared on the same cases. `--pictures` writes the curves and one phantom slice under each corruption.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from contrast_folds import judged_cases
from goals import Goal
from matplotlib.figure import Figure

from medvit.config import EvaluationConfig, RobustnessConfig
from medvit.evaluation.curves import Curve, Robustness
from medvit.evaluation.physics import CORRUPTIONS, corrupt, draws
from medvit.evaluation.robustness import STRESSES, in_order, measure_robustness, worsened
from medvit.evaluation.robustness_chart import draw_robustness
from medvit.inference import Judged
from medvit.io import phantom

COSTED, EPSILONS = 6, (1.0, 5.0)
"""Cases that costs are taken from, and on which FGSM and PGD are compared at so many HU."""


def show(measured: Robustness) -> None:
    """The curves as a table."""
    print(measured.extent, flush=True)
    print("| | cases | clean | AUROC, and its change, at each severity |\n|---|---|---|---|")
    for curve in measured.curves:
        cells = [f"{level.severity:g}: {level.auroc:.2f} ({_signed(level.change)})" for level in curve.levels]
        print(f"| {curve.name}, {curve.unit} | {curve.cases} | {curve.clean.point:.2f} | {'; '.join(cells)} |")
    for one in measured.not_measured:
        print(f"| {one.name} | not measured: {one.reason} | | |")


def _signed(change: Any) -> str:
    return f"{change.point:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


def costs(judged: Sequence[Judged]) -> dict[str, float]:
    """Seconds to make one picture at the strongest of each, in clean predictions of the same cases."""
    seconds = defaultdict[str, float](float)
    for one in judged:
        slices = one.load(one.case)
        seconds["clean"] += _seconds(partial(one.model.predict_slices, slices, one.case))
        for name, stress in STRESSES.items():
            seconds[name] += _seconds(partial(worsened, one, slices, name, stress.severities[-1], 0))
    clean = seconds.pop("clean")
    return {name: took / clean for name, took in seconds.items()}


def beyond_fgsm(judged: Sequence[Judged], epsilon: float) -> float:
    """How much less probable the true class is after PGD than after FGSM, mean over the same cases."""

    def probable(one: Judged, name: str) -> float:
        shown = worsened(one, one.load(one.case), name, epsilon, 0)
        return one.model.predict_slices(shown, one.case).probabilities[str(one.case.label)]

    return float(np.mean([probable(one, "FGSM") - probable(one, "PGD") for one in judged]))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def draw_corruptions() -> Figure:
    """One phantom slice, clean and under the strongest of each corruption, soft-tissue window."""
    hu, _ = phantom.render(phantom.make_patients(1, 0, sites=(phantom.SITES[2],))[0], matrix=224, slices=9)
    slices = hu.astype(np.int16)
    pictures = {"clean": slices} | {
        f"{name}, {one.severities[-1]:g} {one.unit}": corrupt(
            name, slices, one.severities[-1], draws(0, "phantom"), ["soft_tissue"]
        )
        for name, one in CORRUPTIONS.items()
    }
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    for panel, (title, picture) in zip(figure.subplots(3, 3).ravel(), pictures.items(), strict=True):
        panel.imshow(picture[4], cmap="gray", vmin=-160, vmax=240)
        panel.set_title(title, fontsize=9)
        panel.axis("off")
    return figure


def goals_of(measured: Robustness, ratios: dict[str, float], beyond: dict[str, float]) -> list[Goal]:
    """What must hold."""
    dearest = max((name for name in CORRUPTIONS), key=lambda name: ratios[name])
    found = [
        Goal("seconds used, share of the cap", measured.seconds / (60 * measured.minutes), 0, 1.1),
        Goal(f"dearest corruption ({dearest}), in clean predictions", ratios[dearest], 0, 1),
    ]
    found += [
        Goal(f"PGD less FGSM, {epsilon} HU: fall of the true class's probability", fall, -0.001, 1)
        for epsilon, fall in beyond.items()
    ]
    return found


def main() -> None:
    """Curves, costs, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--minutes", type=float, default=6, help="time cap of the curves (default: 6)")
    parser.add_argument("--quick", action="store_true", help="as usual: it takes less than 10 minutes")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries
    shared = arguments.data or Path(os.environ.get("MEDVIT_REAL_DATA", "."))
    settings = EvaluationConfig(robustness=RobustnessConfig(minutes=arguments.minutes, cases=100))
    with tempfile.TemporaryDirectory() as folder:
        judged = judged_cases(shared, Path(folder))
        measured = measure_robustness(judged, settings)
        show(measured)
        few = in_order(judged, 1)[:COSTED]
        ratios, beyond = costs(few), {f"{epsilon:g}": beyond_fgsm(few, epsilon) for epsilon in EPSILONS}
    print("\n| one picture takes | clean predictions |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.2f} |")
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        (arguments.pictures / "robustness.svg").write_text(draw_robustness(measured), encoding="utf-8")
        draw_corruptions().savefig(arguments.pictures / "corruptions.png", dpi=70)
    print()
    goals = goals_of(measured, ratios, beyond)
    for goal in goals:
        print(f"{goal.what:70}{goal.figure:8.3f}, {goal.low:g} to {goal.high:g}{'' if goal.met else '  MISSED'}")
    met = sum(goal.met for goal in goals)
    result = {"name": "robustness", "figure": met, "unit": "goals met", "goal": len(goals), "met": met == len(goals)}
    detail = {"goals": [asdict(goal) for goal in goals], "costs": ratios, "curves": [_told(c) for c in measured.curves]}
    print(json.dumps(result | {"detail": detail | {"extent": measured.extent}}))


def _told(curve: Curve) -> dict[str, Any]:
    return {"name": curve.name, "cases": curve.cases, "clean": round(curve.clean.point, 3)} | {
        f"{level.severity:g}": round(level.auroc, 3) for level in curve.levels
    }


if __name__ == "__main__":
    main()
