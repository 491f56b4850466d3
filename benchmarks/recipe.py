"""Which recipe makes a CT classifier of a pretrained ViT, when all have the same time?

    MEDVIT_REAL_DATA=/data python benchmarks/recipe.py [--runs FILE] [--quick]

A frozen probe, fine-tuning in one go, in stages, with layer-wise rates, on growing pictures, with mixup and CutMix, and
models from random weights: each trains for the same seconds on the same patients and is judged on the same others, in
three rounds. Every run is a line of FILE: an interrupted benchmark goes on there. What was fixed beforehand is in
README.md.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MEDVIT_SITE_KEY", "benchmarks")  # splits follow the hashes of patients: the same everywhere

from recipe_contenders import CONSTANT, CONTENDERS, GROWING, SIZE, UNTRAINED
from recipe_run import Job, run
from recipe_sets import ROUNDS, SETS, Cases, prepare_at
from recipe_tables import Runs, claim, compare, curve, recommend
from workers import workers

FEW = ("frozen probe", "staged + rates")
"""Those who are tried on few patients, and on the sets that illustrate."""


@dataclass(frozen=True)
class Plan:
    """What is run on a set.

    Attributes:
        seconds: of each run, on one thread of the machine that `SPEED` was measured on.
        contenders: names.
        patients: numbers of them that `FEW` train on, beside all.
    """

    seconds: float
    contenders: Sequence[str]
    patients: Sequence[int] = ()

    def jobs(self, name: str, rounds: int) -> Iterator[Job]:
        """All runs, round by round, so that whoever interrupts has whole comparisons; others first each time."""
        for number in range(rounds):
            turn = (3 * number) % len(self.contenders)
            for contender in (*self.contenders[turn:], *self.contenders[:turn]):
                if number == 0 or contender not in UNTRAINED:
                    yield Job(name, contender, number, 0, self.seconds)
            for patients in self.patients:
                for contender in FEW:
                    yield Job(name, contender, number, patients, self.seconds)


DECIDE = ("phantom", "ct_ich by slice")
"""The recommendation follows from these; the others illustrate."""

RIVALS = tuple(name for name, one in CONTENDERS.items() if one.size == SIZE and name not in UNTRAINED)

PLANS: Mapping[str, Plan] = {
    "ct_ich by slice": Plan(175, tuple(CONTENDERS), (12, 25)),
    "phantom": Plan(30, RIVALS),
    "siim_ct_100": Plan(60, FEW),
    "ct_ich by study": Plan(100, FEW),
}

QUICK: Mapping[str, Plan] = {
    "ct_ich by slice": Plan(25, (*RIVALS, CONSTANT, GROWING), (12,)),
    "phantom": Plan(10, RIVALS),
}
"""One round, and so short that it shows the machinery and no differences."""


def main() -> None:
    """Run what is not in FILE yet, print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--runs", type=Path, default=Path("recipe-runs.jsonl"), help="a line per run, to go on from")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at once, one thread each")
    parser.add_argument("--quick", action="store_true", help="under ten minutes: one round, short runs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shared = arguments.data or (Path(os.environ["MEDVIT_REAL_DATA"]) if "MEDVIT_REAL_DATA" in os.environ else None)
    plans, rounds = (QUICK, 1) if arguments.quick else (PLANS, ROUNDS)
    plans = plans if shared else {"phantom": plans["phantom"]}
    jobs = [job for name, plan in plans.items() for job in plan.jobs(name, rounds)]
    runs = Runs(arguments.runs, jobs)
    with tempfile.TemporaryDirectory() as scratch:
        work(runs, plans, Path(scratch), shared, arguments.processes)
    report(runs, plans)


def work(runs: Runs, plans: Mapping[str, Plan], scratch: Path, shared: Path | None, processes: int) -> None:
    """Do the runs that are missing, set by set."""
    weights = str(shared / "weights" / "vit_small_patch14_dinov2.safetensors") if shared else "none"
    if not shared:
        print("no real data: the phantom only", flush=True)
    with workers(processes) as pool:
        for name, plan in plans.items():
            if missing := runs.missing(name):
                found = SETS[name](scratch / name.replace(" ", "-"), shared / "data" if shared else None)
                for size in {CONTENDERS[contender].size for contender in plan.contenders}:
                    prepare_at(size, found.cases, found.cache, found.settings)
                print(f"\n{name}: {about(found)}; {len(missing)} runs", flush=True)
                for future in as_completed([pool.submit(run, job, found, weights) for job in missing]):
                    runs.add(future.result())
                    print(f"  {told(future.result())}", flush=True)


def told(row: Mapping[str, Any]) -> str:
    """A run in one line."""
    who = f"{row['contender']}, round {row['round']}, {row['patients'] or 'all'} patients"
    return f"{who}: {row['trained_s']:.0f} s, epochs {' + '.join(map(str, row['epochs']))}"


def about(found: Cases) -> str:
    """Cases, patients, and sizes of the rounds."""
    positive = sum(case.label == found.classes[-1] for case in found.cases)
    sizes = ", ".join(f"{len(train)}/{len(test)}" for train, test in found.rounds)
    patients = len({case.group for case in found.cases})
    return f"{len(found.cases)} cases ({positive} positive) of {patients} patients; trained on/judged {sizes}"


def report(runs: Runs, plans: Mapping[str, Plan]) -> None:
    """All tables, the recommendation, and the JSON object."""
    detail: dict[str, Any] = {}
    for name, plan in plans.items():
        detail[name] = compare(runs, name, plan.contenders)
        if plan.patients:
            detail[f"{name}, few patients"] = curve(runs, name, FEW, plan.patients)
    held = {name: claim(runs, name, CONSTANT, GROWING) for name, plan in plans.items() if GROWING in plan.contenders}
    detail["progressive resizing"] = held
    detail["recommended"] = recommend(runs, [name for name in DECIDE if name in plans])
    share = max((each["share"] for each in held.values()), default=float("nan"))
    met = share <= 0.6 and all(each["overlap"] for each in held.values())
    result = {
        "name": "recipe",
        "figure": None if math.isnan(share) else round(share, 3),
        "unit": "share of the constant size's time",
        "goal": 0.6,
    }
    print(json.dumps({**result, "met": met, "detail": detail}))


if __name__ == "__main__":
    sys.exit(main())
