"""Do the intervals of the fairness report hold what they promise? Simulated cohorts, whose truth is known.

    python benchmarks/fairness.py [--cohorts N] [--draws N] [--processes N] [--quick]

Three sites of equal size; patients with one to three cases that resemble each other; labels, scores and calls from a
latent normal score, so that every rate and every AUROC is known exactly. At one site the finding scores lower. Each
cohort goes through `assess_fairness`, the very function behind the report.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from goals import Goal
from scipy import stats

from medvit.config import EvaluationConfig
from medvit.evaluation.fairness import FairnessTable, assess_fairness
from medvit.evaluation.predictions import check_predictions

SITES = ("North", "South", "West")
TPR, FPR = 0.85, 0.2
PATIENT_SHARE = 0.4
"""Of the score's variance that is the patient's, common to all of their cases."""

SIGNED = ("selection_rate", "tpr", "fpr", "ppv", "npv", "auroc")
RANGE = (0.92, 0.98)
BOUND = 0.93
ALARMS, POWER = 0.065, 0.95


@dataclass(frozen=True)
class Design:
    """What a cohort is drawn from.

    Attributes:
        patients: in all.
        gap: by how much the TPR at the last site is lower.
        prevalence: at each site.
    """

    patients: int
    gap: float
    prevalence: tuple[float, float, float] = (0.4, 0.4, 0.4)


DESIGNS = (
    *(Design(patients, gap) for patients in (300, 2000) for gap in (0.0, 0.1, 0.3)),
    Design(2000, 0.15),
    Design(2000, 0.0, (0.2, 0.4, 0.6)),
)


def truth(design: Design, site: int) -> dict[str, float]:
    """The site's true figures: a call is a score above the FPR's quantile; findings score `shift` higher."""
    share = design.prevalence[site]
    tpr = TPR - design.gap * (site == 2)
    shift = stats.norm.isf(FPR) - stats.norm.isf(tpr)
    selected = share * tpr + (1 - share) * FPR
    return {
        "selection_rate": selected,
        "tpr": tpr,
        "fpr": FPR,
        "ppv": share * tpr / selected,
        "npv": (1 - share) * (1 - FPR) / (1 - selected),
        "auroc": float(stats.norm.cdf(shift / math.sqrt(2))),
        "shift": float(shift),
    }


def cohort(design: Design, seed: int) -> pd.DataFrame:
    """Predictions of one cohort."""
    rng = np.random.default_rng([seed, design.patients, round(1000 * design.gap)])
    site_of = np.arange(design.patients) % 3
    patient = np.repeat(np.arange(design.patients), rng.integers(1, 4, design.patients))
    site = site_of[patient]
    # half of the patients are the same in all their cases, as scans of one illness are
    draw = np.where(
        (rng.random(design.patients) < 0.5)[patient], rng.random(design.patients)[patient], rng.random(len(patient))
    )
    finding = draw < np.array(design.prevalence)[site]
    own = rng.normal(size=design.patients)[patient]
    latent = math.sqrt(PATIENT_SHARE) * own + math.sqrt(1 - PATIENT_SHARE) * rng.normal(size=len(patient))
    latent += finding * np.array([truth(design, s)["shift"] for s in range(3)])[site]
    probability = stats.norm.cdf(latent / 2)
    return pd.DataFrame(
        {
            "patient_id": patient.astype(str),
            "label": finding.astype(int).astype(str),
            "p_1": probability,
            "threshold": float(stats.norm.cdf(stats.norm.isf(FPR) / 2)),
            "site": np.array(SITES)[site],
        }
    )


def judge(design: Design, draws: int, seed: int) -> dict[str, float]:
    """Of one cohort: which intervals hold the truth, the p-value, and the verdict."""
    warnings.simplefilter("ignore")
    frame = check_predictions(cohort(design, seed))
    (table,) = assess_fairness(frame, "site", EvaluationConfig(bootstrap=draws))
    return _held(table, design) | {"p": table.no_gap_p, "bound": float(table.equalized_odds.high >= design.gap)}


def _held(table: FairnessTable, design: Design) -> dict[str, float]:
    """Share of the three pairs of sites whose interval holds the true difference, by figure."""
    values = {name: truth(design, i) for i, name in enumerate(SITES)}
    found: dict[str, list[bool]] = {name: [] for name in SIGNED}
    for one in table.differences:
        if one.figure in found:
            true = values[one.first][one.figure] - values[one.second][one.figure]
            found[one.figure].append(one.difference.low <= true <= one.difference.high)
    return {name: float(np.mean(held)) for name, held in found.items()}


def goals(design: Design, rows: list[dict[str, float]]) -> list[Goal]:
    """What is asked of a design."""
    name = f"{design.patients} patients, gap {design.gap:g}"
    alarms = float(np.mean([row["p"] < 0.05 for row in rows]))
    if len(set(design.prevalence)) > 1:
        return [Goal(f"{name}, unequal prevalence: alarms", alarms, 0, ALARMS)]
    if design.gap == 0.15:
        return [Goal(f"{name}: found", alarms, POWER, 1)]
    found = [Goal(f"{name}: {figure}", float(np.mean([r[figure] for r in rows])), *RANGE) for figure in SIGNED]
    found.append(Goal(f"{name}: bound of the largest", float(np.mean([row["bound"] for row in rows])), BOUND, 1))
    if design.gap == 0 and design.patients == 2000:
        found.append(Goal(f"{name}: alarms", alarms, 0, ALARMS))
    return found


def main() -> None:
    """Run all designs, print a table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=1000, help="of each design")
    parser.add_argument("--draws", type=int, default=400, help="of bootstrap and permutation in each cohort")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="100 cohorts: under ten minutes")
    arguments = parser.parse_args()
    cohorts, began = 100 if arguments.quick else arguments.cohorts, time.perf_counter()
    asked: list[Goal] = []
    print("| design | " + " | ".join(SIGNED) + " | bound of the largest | p < 0.05 |")
    print("|---" * (len(SIGNED) + 3) + "|")
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for design in DESIGNS:
            rows = pool.map(partial(judge, design, arguments.draws), range(cohorts), chunksize=10)
            shares = [100 * float(np.mean([row[name] for row in rows])) for name in (*SIGNED, "bound")]
            alarms = sum(row["p"] < 0.05 for row in rows)
            name = f"{design.patients} patients, gap {design.gap:g}"
            name += ", prevalence 0.2, 0.4, 0.6" if len(set(design.prevalence)) > 1 else ""
            print("| " + " | ".join([name, *(f"{share:.1f}" for share in shares), str(alarms)]) + " |", flush=True)
            asked += goals(design, rows)
    for goal in asked:
        if not goal.met:
            print(f"{goal.what}: {goal.figure:.3f}, wanted {goal.low:g} to {goal.high:g}  MISSED")
    detail: dict[str, Any] = {"goals": [asdict(goal) for goal in asked], "cohorts": cohorts, "draws": arguments.draws}
    detail["seconds"] = round(time.perf_counter() - began)
    met = sum(goal.met for goal in asked)
    result = {"name": "fairness", "figure": met, "unit": "goals met", "goal": len(asked), "met": met == len(asked)}
    print(json.dumps(result | {"detail": detail}))


if __name__ == "__main__":
    main()
