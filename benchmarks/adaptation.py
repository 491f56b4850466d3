"""What learning from an unlabelled site is worth: source-only, DANN, CDAN, MMD and an oracle on three problems.

    python benchmarks/adaptation.py [--part digits|phantom|ct|all] [--seeds N] [--runs FILE] [--data FOLDER] [--quick]

Digits (MNIST to USPS and back), the textbook pair; three phantom sites, the third without labels; real CT, Siemens with
labels and GE without. Every method of a seed sees the same cases, starts from the same weights and takes as many steps;
the oracle is given the labels that the others must do without. No target label of a seed that is judged chose anything.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adaptation_problems import ct_labels
from adaptation_runs import STRENGTH, Part, Settings, design, run
from lines import add_line, read_lines
from scipy import stats

from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Interval, weighted_auroc

METHODS = ("source", "dann", "cdan", "mmd", "oracle")
GOAL = ("source", "dann", "oracle")
"""Of the phantom's goal."""
LONG = {"source": "source only", "dann": "DANN", "cdan": "CDAN+E", "mmd": "MMD", "oracle": "oracle"}

PROBLEMS: dict[Part, tuple[str, ...]] = {
    "digits": ("MNIST to USPS", "USPS to MNIST"),
    "phantom": ("two sites to a third",),
    "ct": ("Siemens to GE",),
}

PLAN: dict[Part, dict[str, int]] = {
    "digits": {"first": 0, "seeds": 5, "epochs": 10, "batch": 32},
    "phantom": {"first": 30, "seeds": 10, "epochs": 48, "batch": 12},
    "ct": {"first": 0, "seeds": 5, "epochs": 10, "batch": 8},
}
QUICK: dict[Part, dict[str, int]] = {
    "digits": {"first": 0, "seeds": 1, "epochs": 3, "batch": 32},
    "phantom": {"first": 30, "seeds": 1, "epochs": 4, "batch": 12},
    "ct": {"first": 0, "seeds": 1, "epochs": 3, "batch": 8},
}
"""`first` is the first seed: smaller ones are spent on earlier designs of the phantom."""

PUBLISHED = {
    "MNIST to USPS": {"source": "75.2", "dann": "77.1 / 90.4", "cdan": "95.6", "mmd": "", "oracle": ""},
    "USPS to MNIST": {"source": "57.1", "dann": "73.0 / 94.7", "cdan": "98.0", "mmd": "", "oracle": ""},
}
"""Accuracy in percent with LeNet-like nets: Tzeng et al. 2017 (source only; gradient reversal, before the slash), Long
et al. 2018 (DANN, after it; CDAN+E, on all training images)."""

SWEPT = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the sweep, on a seed that no table uses."""
SWEEP_SEED = 1000

BESIDE = 4
"""Seeds of the phantom on which CDAN and MMD run beside those that the goal is about; all would take an hour."""

DESIGNS = 4
"""Designs of the phantom that were judged, three of which missed the goal (README.md): the more are tried, the more
likely luck meets it, so the last is shown with an interval for four as well (Bonferroni)."""

POWER = 2.8
"""Standard errors from zero of a difference that is found in four of five studies at the 5 % level."""


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean over seeds, with Student's interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """Rows of finished runs, one JSON object per line; what was run under another design does not count."""

    path: Path | None

    def rows(self) -> dict[Settings, dict[str, Any]]:
        """What is there already."""
        return {
            Settings(**line["settings"]): line["found"]
            for line in (read_lines(self.path) if self.path else [])
            if line["design"] == design(Settings(**line["settings"]))
        }

    def add(self, settings: Settings, found: dict[str, Any]) -> None:
        """Append one."""
        if self.path is not None:
            add_line(self.path, {"settings": asdict(settings), "design": design(settings), "found": found})


def planned(part: Part, plan: dict[str, int]) -> list[Settings]:
    """All runs of a part; the methods of one seed after each other."""
    methods = [name for name in METHODS if part != "ct" or name != "oracle"]
    return [
        Settings(part, problem, method, seed, STRENGTH[part][method], plan["epochs"], plan["batch"])
        for seed in range(plan["first"], plan["first"] + plan["seeds"])
        for problem in PROBLEMS[part]
        for method in methods
        if part != "phantom" or method in GOAL or seed < plan["first"] + BESIDE
    ]


def swept(part: Part, plan: dict[str, int]) -> list[Settings]:
    """Strengths on one seed of its own."""
    first = [one for one in planned(part, plan | {"seeds": 1}) if one.method in ("dann", "cdan", "mmd")]
    return [replace(one, seed=SWEEP_SEED, strength=strength) for one in first for strength in SWEPT]


def executed(
    wanted: Sequence[Settings], journal: Journal, shared: Path, processes: int
) -> dict[Settings, dict[str, Any]]:
    """Rows of all wanted runs, those that are missing run now, in some processes of one thread each."""
    known = journal.rows()
    missing = [one for one in wanted if one not in known]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them from the journal", flush=True)
    # what begins alike stays in one process, which learns the source once for all of it
    groups = [list(group) for _, group in groupby(missing, key=lambda one: (one.problem, one.seed))]
    work = partial(_run_group, journal=journal, shared=shared)
    if processes == 1:
        torch.set_num_threads(os.cpu_count() or 1)
        done = list(map(work, groups))
    else:
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, initializer=_prepare) as pool:
            done = list(pool.imap_unordered(work, groups))
    return {one: (known | dict(chain.from_iterable(done)))[one] for one in wanted}


def _run_group(group: Sequence[Settings], journal: Journal, shared: Path) -> list[tuple[Settings, dict[str, Any]]]:
    """Each run is written down when it ends: whatever ends the process, it is not lost."""
    done = []
    for settings in group:
        found = run(settings, shared)
        journal.add(settings, found)
        done.append((settings, found))
        shown = f"{settings.problem}, seed {settings.seed}, {LONG[settings.method]}, strength {settings.strength:g}"
        print(f"  {shown}: {found['seconds']:.0f} s", flush=True)
    return done


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of libraries


# ---- tables ---------------------------------------------------------------------------------------------------------

Rows = dict[Settings, dict[str, Any]]


def column(rows: Rows, problem: str, method: str, name: str, like: str = "") -> list[float]:
    """A figure of each seed (that another method has as well), in order of seeds; NaN where it was not measured."""
    seeds = {s.seed for s in rows if (s.problem, s.method) == (problem, like or method)}
    chosen = sorted((s.seed, found[name]) for s, found in rows.items() if (s.problem, s.method) == (problem, method))
    return [math.nan if value is None else value for seed, value in chosen if seed in seeds]


def show(rows: Rows, problem: str, unit: str, scale: float) -> dict[str, Any]:
    """A table of one problem; what it says, for the JSON."""
    methods = [name for name in METHODS if any((s.problem, s.method) == (problem, name) for s in rows)]
    told = {}
    print(f"\n{problem}: {unit} at the target, mean [95 % interval over seeds]")
    told_of = ("information", "domain accuracy", "probe", "MMD", "published")
    print("| method | seeds | target | less source only | source | " + " | ".join(told_of) + " |")
    print("|" + "---|" * (5 + len(told_of)))
    for method in methods:
        target, base = (np.array(column(rows, problem, one, "target", method)) for one in (method, "source"))
        mean, difference = t_interval(target * scale), t_interval((target - base) * scale)
        others = [
            float(np.mean(column(rows, problem, method, name)))
            for name in ("source", "information", "domain_accuracy", "probe", "mmd")
        ]
        cells = [str(len(target)), text(mean), "" if method == "source" else text(difference, signed=True)]
        cells += ["" if math.isnan(value) else f"{value:.3f}" for value in others]
        print("| " + " | ".join([LONG[method], *cells, PUBLISHED.get(problem, {}).get(method, "")]) + " |")
        told[method] = {"target": asdict(mean), "difference": asdict(difference), "probe": others[3], "mmd": others[4]}
        told[method]["seeds"] = len(target)
    return told


def text(interval: Interval, *, signed: bool = False) -> str:
    """With two or three digits, as its size asks for."""
    digits = 3 if max(abs(interval.point), abs(interval.low or 0)) < 2 else 1
    sign = "+" if signed else ""
    ends = "" if math.isnan(interval.low) else f" [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"
    return f"{interval.point:{sign}.{digits}f}{ends}"


def show_sweep(rows: Rows, unit: str) -> None:
    """Invariance against accuracy. What may choose a strength comes first: source, and information without labels."""
    print(f"\nstrength, one seed apart; chosen by: source + information (no target label); {unit} at the target after")
    print("| problem | method | strength | source | information | sum | probe | MMD | target |")
    print("|---|---|---|---|---|---|---|---|---|")
    for s, found in rows.items():
        source = found["source"] or 0.0
        figures = [source, found["information"], source + found["information"], *(found[n] for n in ("probe", "mmd"))]
        cells = [s.problem, LONG[s.method], f"{s.strength:g}", *(f"{value:.3f}" for value in figures)]
        print("| " + " | ".join([*cells, f"{found['target']:.3f}"]) + " |")


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """One figure that must be above another."""

    what: str
    figure: float
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Never with NaN."""
        return self.figure >= self.goal if self.at_least else self.figure > self.goal


def judge_digits(rows: Rows) -> tuple[list[Goal], dict[str, Any]]:
    """Gain of DANN and CDAN in both directions."""
    told = {problem: show(rows, problem, "accuracy, %", 100) for problem in PROBLEMS["digits"]}
    goals = [
        Goal(f"{problem}: {LONG[method]} less source only, %, lower end", told[problem][method]["difference"]["low"], 0)
        for problem in PROBLEMS["digits"]
        for method in ("dann", "cdan")
    ]
    return goals, told


def judge_phantom(rows: Rows) -> tuple[list[Goal], dict[str, Any]]:
    """Whether DANN closes more than half of the gap between source-only and oracle."""
    (problem,) = PROBLEMS["phantom"]
    told = {problem: show(rows, problem, "AUROC", 1)}
    source, dann, oracle = (np.array(column(rows, problem, name, "target")) for name in ("source", "dann", "oracle"))
    gap, beyond = t_interval(oracle - source), t_interval(dann - (source + oracle) / 2)
    wary = t_interval(dann - (source + oracle) / 2, 1 - 0.05 / DESIGNS)
    print(f"oracle less source only {text(gap, signed=True)}; DANN less their mean {text(beyond, signed=True)}")
    print(f"at {1 - 0.05 / DESIGNS:.2%}, for the {DESIGNS} designs that were tried: {text(wary, signed=True)}")
    goals = [
        Goal("phantom: oracle less source only, AUROC", gap.point, 0.15, at_least=True),
        Goal("phantom: DANN less the mean of source only and oracle, AUROC, lower end", beyond.low, 0),
    ]
    return goals, told | {"gap": asdict(gap), "beyond_half": asdict(beyond), "of_designs": asdict(wary)}


def judge_ct(rows: Rows, shared: Path) -> tuple[list[Goal], dict[str, Any]]:
    """AUROC on GE with patients resampled: no goal, 22 patients cannot decide it."""
    (problem,) = PROBLEMS["ct"]
    show(rows, problem, "AUROC", 1)
    labels, patients = ct_labels(shared / "data", "GE MEDICAL SYSTEMS")
    bootstrap = PatientBootstrap(patients)
    scores = {name: np.array(column(rows, problem, name, "scores")) for name in METHODS if name != "oracle"}
    told = {}
    print("\nmean over seeds, [95 % interval over resampled patients]; smallest detectable: 2.8 standard errors")
    print("| method | AUROC on GE | less source only | smallest detectable difference |\n|---|---|---|---|")
    for name, found in scores.items():
        of, base = ([partial(weighted_auroc, labels == 1, one) for one in side] for side in (found, scores["source"]))
        level = bootstrap.interval(partial(_mean, of))
        point, draws = bootstrap.apply(lambda weights, of=of, base=base: _mean(of, weights) - _mean(base, weights))
        low, high = np.nanquantile(draws, [0.025, 0.975])
        difference, detectable = Interval(float(point), float(low), float(high)), POWER * float(np.nanstd(draws))
        cells = ["", ""] if name == "source" else [text(difference, signed=True), f"{detectable:.3f}"]
        print("| " + " | ".join([LONG[name], text(level), *cells]) + " |")
        told[name] = {"auroc": asdict(level), "difference": asdict(difference), "detectable": detectable}
    return [], {problem: told}


def _mean(statistics: Iterable[Any], weights: Any) -> Any:
    return np.mean([statistic(weights) for statistic in statistics], axis=0)


def main() -> None:
    """Run what is missing, print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--seeds", type=int, help="of each part (default: 5, 10 and 5)")
    parser.add_argument("--runs", type=Path, help="JSON lines of finished runs: written, and gone on with")
    parser.add_argument("--data", type=Path, help="holds data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="of one thread each; 1: one of all threads"
    )
    parser.add_argument("--sweep", action="store_true", help="strengths on one seed of its own, instead of the tables")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs: under ten minutes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries
    shared = arguments.data or Path(os.environ.get("MEDVIT_REAL_DATA", "."))
    parts: list[Part] = [part for part in PROBLEMS if arguments.part in (part, "all")]
    if absent := [part for part in parts if part != "phantom" and not (shared / "data").is_dir()]:
        print(f"without --data or MEDVIT_REAL_DATA there is nothing for: {', '.join(absent)}")
        parts = [part for part in parts if part not in absent]
    goals: list[Goal] = []
    detail: dict[str, Any] = {}
    for part in parts:
        plan = dict((QUICK if arguments.quick else PLAN)[part])
        plan["seeds"] = arguments.seeds or plan["seeds"]
        wanted = swept(part, plan) if arguments.sweep else planned(part, plan)
        rows = executed(wanted, Journal(arguments.runs), shared, arguments.processes)
        if arguments.sweep:
            show_sweep(rows, "accuracy" if part == "digits" else "AUROC")
            continue
        found, told = judge_ct(rows, shared) if part == "ct" else JUDGES[part](rows)
        goals, detail = goals + found, detail | told
    print()
    for goal in goals:
        print(f"{goal.what:80}{goal.figure:8.3f}, above {goal.goal:g}{'' if goal.met else '  MISSED'}")
    result = {
        "name": "adaptation",
        "figure": sum(goal.met for goal in goals),
        "unit": "goals met",
        "goal": len(goals),
        "met": all(goal.met for goal in goals),
        "detail": {"goals": [asdict(goal) for goal in goals], "sweep": arguments.sweep, **detail},
    }
    print(json.dumps(result))


JUDGES = {"digits": judge_digits, "phantom": judge_phantom}

if __name__ == "__main__":
    main()
