"""Does a schedule that relaxes learn as much without labels, in less time; and is it worth it where labels are few?

    MEDVIT_REAL_DATA=/data python benchmarks/pretraining.py [--runs FILE] [--quick]

Small ViTs from random weights on digits, phantom slices and slices of head CT: SimCLR, MoCo v3 and DINO, uncompressed,
with large patches throughout, and with the schedule that relaxes, for shares of the same compute, three seeds each. A
step of each has a price in processor seconds, measured once, in turns. What was learned (by MAE too) is then fine-tuned
on few labelled patients, against random weights. Every run is a line of FILE: an interrupted benchmark goes on there.
What was fixed beforehand is in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MEDVIT_SITE_KEY", "benchmarks")  # splits follow the hashes of patients: the same everywhere

import numpy as np
from goals import Goal
from lines import add_line, read_lines
from pretraining_few import LABELLED, gains, score_few
from pretraining_run import STRATEGIES, Job, judge, pretrain, price
from pretraining_sets import SETS, Pictures, prepare
from workers import workers

METHODS = ("simclr", "mocov3", "dino")
"""Compared at different compute; MAE takes part where labels are few."""

SECONDS: Mapping[str, float] = {"digits": 100.0, "phantom": 60.0, "ct_ich": 60.0}
"""Of processor, at the price of its steps, of an uncompressed run with a share of 1."""

MEASURE: Mapping[str, str] = {"digits": "knn", "phantom": "auroc", "ct_ich": "auroc"}
"""What a target is set on: balanced accuracy of neighbours, AUROC of a linear probe."""

SHARES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "digits": {"uncompressed": (0.5, 1.0), "constant": (0.5,), "relaxing": (0.25, 0.5)},
    "phantom": {"uncompressed": (0.5, 1.0), "constant": (0.5,), "relaxing": (0.5,)},
    "ct_ich": {"uncompressed": (0.5, 1.0), "constant": (0.5,), "relaxing": (0.5,)},
}
"""Of the seconds, by strategy."""

FEW = (("uncompressed", 1.0), ("relaxing", 0.5))
"""What is tuned on few labelled patients, beside the untrained encoder."""

DRAWS = 5
"""Of those patients, for each seed of pretraining."""

COMPARISONS = len(LABELLED) * (len(METHODS) * len(FEW) + 1)
"""With random weights: of every objective, uncompressed and relaxing, and of MAE, on every set with few labels."""

DECIDES = "digits"
"""The set that the claim on compute is judged on; the others illustrate."""

REACHED = 0.98
"""The target: this share of the way from the untrained encoder to the uncompressed one at full compute."""

SEEDS = 3

Row = Mapping[str, Any]
Prices = Mapping[str, Mapping[str, float]]
"""Objective -> strategy -> processor seconds of a step."""


def main() -> None:
    """Run what is not in FILE yet, print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with data/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--runs", type=Path, default=Path("pretraining-runs.jsonl"), help="a line per run, to go on")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--picture", type=Path, default=Path("pretraining.png"), help="the curves")
    parser.add_argument("--quick", action="store_true", help="under ten minutes: one seed, short runs: machinery only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shared = arguments.data or (Path(os.environ["MEDVIT_REAL_DATA"]) if "MEDVIT_REAL_DATA" in os.environ else None)
    plan = Plan(tuple(SETS) if shared else ("phantom",), arguments.quick)
    rows = Rows(arguments.runs)
    with tempfile.TemporaryDirectory() as scratch:
        work(plan, rows, Path(scratch), shared / "data" if shared else Path(), arguments.processes)
    report(plan, rows, arguments.picture)


@dataclass(frozen=True)
class Plan:
    """What is run: which sets, and whether only the machinery is tried."""

    sets: Sequence[str]
    quick: bool

    def seconds(self, name: str) -> float:
        """Of processor, that a share of 1 of a set may cost."""
        return SECONDS[name] / (20 if self.quick else 1)

    def jobs(self, name: str, prices: Prices) -> list[Job]:
        """All runs of a set, the untrained encoders first, then seed by seed."""
        seeds = range(1 if self.quick else SEEDS)
        shares = [(strategy, share) for strategy in STRATEGIES for share in SHARES[name][strategy]]
        found = [self._job(name, "simclr", "uncompressed", 0.0, prices, seed) for seed in seeds]  # the same for all
        for seed in seeds:
            for method in METHODS:
                found += [self._job(name, method, strategy, share, prices, seed) for strategy, share in shares]
            found += [self._job(name, "mae", "uncompressed", 1.0, prices, seed)] if name in LABELLED else []
        return found

    def _job(self, name: str, method: str, strategy: str, share: float, prices: Prices, seed: int) -> Job:
        steps = int(share * self.seconds(name) / prices[method][strategy])
        tuned = name in LABELLED and (not share or (strategy, share) in FEW)
        draws = (1 if self.quick else DRAWS) if tuned else 0
        return Job(name, method, strategy, share, max(10, steps) if share else 0, draws, seed)


class Rows:
    """The lines of a file: prices of steps by set, and runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.prices = path, dict[Job, Row](), dict[str, Prices]()
        for row in read_lines(path):
            self._take(row)

    def add(self, row: Row) -> None:
        """Keep a line."""
        self._take(row)
        add_line(self.path, row)

    def _take(self, row: Row) -> None:
        if "prices" in row:
            self.prices[row["cases"]] = row["prices"]
        else:
            self.rows[Job(**row["job"])] = row

    def of(self, jobs: Iterable[Job]) -> list[Row]:
        """The lines of jobs."""
        return [self.rows[job] for job in jobs]


def work(plan: Plan, rows: Rows, scratch: Path, shared: Path, processes: int) -> None:
    """Do the runs that are missing, set by set."""
    with workers(processes) as pool:
        for name in plan.sets:
            if name in rows.prices and not missing(plan, rows, name):
                continue
            pictures = prepare(SETS[name](shared), scratch / name)
            if name not in rows.prices:
                rows.add({"cases": name, "prices": {one: price(one, name, pictures) for one in (*METHODS, "mae")}})
            jobs = missing(plan, rows, name)
            print(f"\n{name}: {told(pictures)}; {len(jobs)} runs", flush=True)
            for future in as_completed([pool.submit(run, job, pictures) for job in jobs]):
                rows.add(future.result())
                print(f"  {' '.join(map(str, future.result()['job'].values()))}", flush=True)


def missing(plan: Plan, rows: Rows, name: str) -> list[Job]:
    """Jobs of a set whose prices are known that are still to do."""
    return [job for job in plan.jobs(name, rows.prices[name]) if job not in rows.rows]


def run(job: Job, pictures: Pictures) -> Row:
    """What a job took, how what it learned was judged, and what few labels made of it."""
    objective, seconds = pretrain(job, pictures)
    row = {"job": asdict(job), "seconds": round(seconds, 2), **judge(objective, pictures)}
    if job.draws:
        row["few"] = score_few(objective.encoder().state_dict(), pictures, job)
    if not job.steps:
        asked = ~pictures.learned
        row |= {"patients": pictures.patients[asked].tolist(), "labels": pictures.labels[asked].tolist()}
    return row


def told(pictures: Pictures) -> str:
    """How many slices of whom."""
    learned = pictures.learned
    counts = f"{learned.sum()} slices of {len(set(pictures.patients[learned].tolist()))} patients to learn from"
    return f"{counts}, {(~learned).sum()} judged, {pictures.size} px, {(pictures.size // pictures.patch) ** 2} tokens"


# ---- report ----------------------------------------------------------------------------------------------------------


def report(plan: Plan, rows: Rows, picture: Path) -> None:
    """Tables, curves, goals, and the JSON object."""
    detail: dict[str, Any] = {name: {one: compare(plan, rows, name, one) for one in METHODS} for name in plan.sets}
    gained = []
    for name in plan.sets:
        if name in LABELLED:
            detail[f"{name}, few labels"] = found = few_labels(plan, rows, name)
            gained += [one["low"] for one in found.values()]
    draw(plan, detail, picture)
    reached = [detail[DECIDES][method]["compute"] for method in METHODS] if DECIDES in plan.sets else []
    quick_enough = sum(share is not None and share <= 0.5 for share in reached)
    goals = [
        Goal("contrastive methods at the uncompressed target with half of the compute", quick_enough, 2, np.inf),
        Goal("few labels: best lower end of a gain over random weights", float(np.nanmax([*gained, -1.0])), 0, np.inf),
    ]
    for goal in goals:
        print(f"{goal.what:72}{goal.figure:8.3f}   at least {goal.low:g}{'' if goal.met else '   MISSED'}")
    detail["goals"] = [{"what": goal.what, "figure": goal.figure, "met": goal.met} for goal in goals]
    result = {"name": "pretraining", "figure": sum(goal.met for goal in goals), "unit": "goals met", "goal": 2}
    print(json.dumps(result | {"met": all(goal.met for goal in goals), "detail": detail}))


def compare(plan: Plan, rows: Rows, name: str, method: str) -> dict[str, Any]:
    """A method on a set: figures by strategy and compute, the target, and the least compute that reaches it."""
    measure, prices = MEASURE[name], rows.prices[name][method]
    jobs = plan.jobs(name, rows.prices[name])
    begin = float(np.mean([row[measure] for row in rows.of(job for job in jobs if not job.steps)]))
    print(f"\n{name}, {method}: untrained {begin:.3f} ({measure})\n")
    print(f"| strategy | compute, of full | steps | kNN | probe | {measure} by seed |\n|---|---|---|---|---|---|")
    points = []
    for strategy in STRATEGIES:
        for share in SHARES[name][strategy]:
            those = [job for job in jobs if (job.objective, job.strategy, job.share) == (method, strategy, share)]
            some, steps = rows.of(those), those[0].steps
            compute = steps * prices[strategy] / plan.seconds(name)
            knn, probe, figure = (float(np.mean([row[one] for row in some])) for one in ("knn", "probe", measure))
            each = ", ".join(f"{row[measure]:.3f}" for row in some)
            print(f"| {strategy} | {compute:.2f} | {steps} | {knn:.3f} | {probe:.3f} | {each} |")
            points.append({"strategy": strategy, "share": share, "compute": compute, measure: figure})
    full = next(one[measure] for one in points if (one["strategy"], one["share"]) == ("uncompressed", 1.0))
    target = begin + REACHED * (full - begin) if full > begin else None
    enough = [p["compute"] for p in points if p["strategy"] == "relaxing" and target and p[measure] >= target]
    least = min(enough, default=None)
    if target is None:
        print("whole slices taught it nothing that this measure shows: no target")
    else:
        reached = "no share tried" if least is None else f"{least:.2f} of the compute"
        print(f"target {target:.3f}: relaxing is there with {reached}")
    return {"untrained": begin, "target": target, "compute": least, "points": points}


def few_labels(plan: Plan, rows: Rows, name: str) -> dict[str, Any]:
    """Gains of each objective, uncompressed and relaxing, over random weights."""
    jobs = plan.jobs(name, rows.prices[name])
    tuned = {"random": rows.of(job for job in jobs if not job.steps)}
    for method in (*METHODS, "mae"):
        for strategy, share in FEW:
            if some := [j for j in jobs if (j.objective, j.strategy, j.share) == (method, strategy, share)]:
                tuned[f"{method}, {strategy}"] = rows.of(some)
    return gains(name, tuned, COMPARISONS)


def draw(plan: Plan, detail: Mapping[str, Any], path: Path) -> None:
    """Figure against measured compute, a panel for each set and method."""
    from matplotlib import pyplot as plt  # noqa: PLC0415  its import is not part of a run

    figure, axes = plt.subplots(len(plan.sets), len(METHODS), figsize=(10, 3 * len(plan.sets)), squeeze=False)
    for row, name in zip(axes, plan.sets, strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            one, measure = detail[name][method], MEASURE[name]
            for strategy in STRATEGIES:
                points = sorted((p["compute"], p[measure]) for p in one["points"] if p["strategy"] == strategy)
                axis.plot(*zip((0, one["untrained"]), *points, strict=True), marker="o", label=strategy)
            if one["target"] is not None:
                axis.axhline(one["target"], color="grey", linestyle=":", label="target")
            axis.set_title(f"{name}, {method}", fontsize=9)
            axis.set_xlabel("measured compute, of uncompressed", fontsize=8)
            axis.set_ylabel({"knn": "kNN, balanced accuracy", "auroc": "AUROC of a probe"}[measure], fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    sys.exit(main())
