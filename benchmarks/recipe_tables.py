"""What the runs of `recipe.py` say: tables with intervals, the claim on progressive resizing, and what follows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from lines import add_line, read_lines
from recipe_contenders import CONTENDERS
from recipe_run import Job

from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Interval, weighted_auroc

KEY = ("cases", "contender", "round", "patients", "seconds")

POWER = 2.8 / 1.96
"""A difference of 2.8 standard errors is seen in 80 % of trials at 5 %; half an interval is 1.96 of them."""


class Judged(NamedTuple):
    """Held-out cases of all rounds, in the same order for every contender; seconds of each round."""

    patients: npt.NDArray[np.str_]
    labels: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    rounds: npt.NDArray[np.str_]
    sexes: npt.NDArray[np.str_]
    trained_s: npt.NDArray[np.float64]
    epochs: tuple[int, ...]
    kept_mb: float

    def auroc(self, strata: npt.NDArray[np.str_] | None = None) -> Interval:
        """Pairs within a round only (or within finer strata): each round has a model of its own."""
        strata = self.rounds if strata is None else strata
        return PatientBootstrap(self.patients).auroc(self.labels, self.scores, strata)

    def minus(self, other: "Judged") -> Interval:
        """Paired difference of AUROC, patients resampled."""

        def difference(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            ours, theirs = (weighted_auroc(self.labels, s, weights, self.rounds) for s in (self.scores, other.scores))
            return ours - theirs

        return PatientBootstrap(self.patients).interval(difference)


@dataclass
class Runs:
    """The lines of a file that belong to the wanted jobs; new ones are appended as they come."""

    path: Path
    jobs: Sequence[Job]

    def __post_init__(self) -> None:
        self.rows = {_key(row): row for row in read_lines(self.path)}

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a run."""
        self.rows[_key(row)] = row
        add_line(self.path, row)

    def missing(self, name: str) -> list[Job]:
        """Jobs of a set that are not done."""
        return [job for job in self.jobs if job.cases == name and _key(vars(job)) not in self.rows]

    def judged(self, name: str, contender: str, patients: int = 0, rounds: Collection[int] = range(99)) -> Judged:
        """A contender on a set; all rounds that it ran, or some."""
        jobs = [job for job in self.jobs if (job.cases, job.contender, job.patients) == (name, contender, patients)]
        chosen = sorted((job for job in jobs if job.round in rounds), key=lambda job: job.round)
        rows = [self.rows[_key(vars(job))] for job in chosen]
        cases = [(str(row["round"]), *case) for row in rows for case in row["predictions"]]
        rounds, people, sexes, labels, scores = map(np.array, zip(*cases, strict=True))
        trained = np.array([row["trained_s"] for row in rows])
        return Judged(
            people, labels.astype(bool), scores, rounds, sexes, trained, tuple(rows[0]["epochs"]), rows[0]["kept_mb"]
        )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def compare(runs: Runs, name: str, contenders: Sequence[str]) -> dict[str, Any]:
    """A table of all contenders on a set: AUROC, what each step is worth, seconds, memory."""
    judged = {contender: runs.judged(name, contender) for contender in contenders}
    print(f"\n{name}\n\n| contender | AUROC | within sex | against | difference | seconds | epochs | MB kept |")
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for contender, one in judged.items():
        against = CONTENDERS[contender].against
        rounds = {int(number) for number in one.rounds}
        paired = one.minus(runs.judged(name, against, rounds=rounds)) if against in judged else None
        auroc, within = one.auroc(), one.auroc(np.char.add(one.rounds, one.sexes))
        row = {
            "auroc": _three(auroc),
            "within_sex": _three(within),
            "against": against,
            "difference": _three(paired) if paired else None,
            "detectable": round(POWER * paired.half_width, 3) if paired else None,
            "trained_s": round(float(np.median(one.trained_s)), 1),
            "epochs": one.epochs,
            "kept_mb": one.kept_mb,
        }
        found[contender] = row
        gain = f"{against} | {signed(paired)}" if paired else "| "
        print(f"| {contender} | {auroc} | {within} | {gain} | {row['trained_s']:.0f} | "
              f"{' + '.join(map(str, one.epochs))} | {row['kept_mb']:.0f} |")  # fmt: skip
    return found


def curve(runs: Runs, name: str, contenders: Sequence[str], patients: Sequence[int]) -> dict[str, Any]:
    """AUROC against the number of labelled patients; 0 stands for all of a round."""
    counts = (*patients, 0)
    print(f"\n{name}: AUROC by labelled patients\n\n| contender | {' | '.join(str(n or 'all') for n in counts)} |")
    print("|" + "---|" * (len(counts) + 1))
    table = {contender: [runs.judged(name, contender, n) for n in counts] for contender in contenders}
    for contender, row in table.items():
        print(f"| {contender} | {' | '.join(str(one.auroc()) for one in row)} |")
    first, second = table.values()
    differences = [theirs.minus(ours) for ours, theirs in zip(first, second, strict=True)]
    print(f"| difference | {' | '.join(map(signed, differences))} |")
    return {contender: [_three(one.auroc()) for one in row] for contender, row in table.items()}


def claim(runs: Runs, name: str, constant: str, short: str) -> dict[str, Any]:
    """Progressive resizing against the constant size: time of each, paired by round, and both intervals."""
    long, brief = runs.judged(name, constant), runs.judged(name, short)
    shares, (one, other) = brief.trained_s / long.trained_s, (brief.auroc(), long.auroc())
    overlap = one.high >= other.low
    print(f"\n{name}, as many epochs: growing pictures {one} in {brief.trained_s.mean():.0f} s, constant size {other} "
          f"in {long.trained_s.mean():.0f} s; share of the time {np.median(shares):.2f} "
          f"({shares.min():.2f} to {shares.max():.2f}), difference {signed(brief.minus(long))}")  # fmt: skip
    return {"share": float(np.median(shares)), "overlap": bool(overlap), "auroc": [_three(one), _three(other)]}


def recommend(runs: Runs, names: Sequence[str]) -> str:
    """The simplest contender that no other is shown to beat on any of the sets, by paired intervals.

    Models from random weights do not take part, nor who is not on all sets.
    """
    order = [c for c in CONTENDERS if "random" not in c and all(_complete(runs, name, c) for name in names)]
    means = {c: np.mean([runs.judged(name, c).auroc().point for name in names]) for c in order}
    best = max(order, key=lambda c: means[c])
    print(f"\nhighest mean AUROC over {' and '.join(names)}: {best} ({means[best]:.3f})")
    for contender in order:
        gaps = [runs.judged(name, best).minus(runs.judged(name, contender)) for name in names if contender != best]
        if not any(gap.low > 0 for gap in gaps):
            print(f"recommended, the simplest that it is not shown to beat: {contender} ({means[contender]:.3f})")
            return contender
    return best


def _complete(runs: Runs, name: str, contender: str) -> bool:
    return any((job.cases, job.contender) == (name, contender) for job in runs.jobs)


def signed(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval.point:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _three(interval: Interval) -> list[float]:
    return [round(value, 3) for value in (interval.point, interval.low, interval.high)]
