"""Which cases make a batch: a function of seed and epoch alone, so that a resumed run and every process agree.

Labelled cases decide how long an epoch is. Unlabelled target cases join them in equal number and go round on their own:
neither is cut short by the other, whichever are more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from medvit.data.dataset import draw
from medvit.records import Case, UsageError

Labels = npt.NDArray[np.int64]

OWN = ("label", "site", "sex")
"""Columns that a case holds itself; all others are among its attributes."""

TARGET_ROUNDS = 1 << 20
"""Where the numbering of rounds through the target cases begins: no epoch has that number."""


def epoch_batches(
    labels: Labels, epoch: int, *, batch_size: int, seed: int, strata: Labels | None = None, processes: int = 1
) -> list[list[int]]:
    """Batches of one epoch, each a list of indices for all processes together.

    All batches are of nearly the same size: no last one of a single case. Half of the cases in a batch are labelled
    where there are unlabelled ones (negative label), else all are.

    Args:
        labels: (N,) class index, negative for unlabelled target cases.
        epoch: from 0.
        batch_size: labelled cases per process.
        seed: of the shuffle.
        strata: (N,) every stratum is drawn as often, the rare ones repeatedly; None: every case once.
        processes: that share a batch; each gets one case at least.

    Raises:
        ValueError: fewer labelled cases than processes, or none.
    """
    source, target = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    if not processes <= len(source):
        raise ValueError(f"{len(source)} labelled cases cannot be shared by {processes} processes")
    rng = draw(seed, epoch)
    order = source[rng.permutation(len(source))] if strata is None else _balanced(source, strata[source], rng)
    count = max(1, min(-(-len(order) // (batch_size * processes)), len(order) // processes))
    batches: list[list[int]] = [part.tolist() for part in np.array_split(order, count)]
    if len(target) == 0:
        return batches
    stream = _round_and_round(target, epoch * len(order), seed)
    return [batch + list(islice(stream, len(batch))) for batch in batches]


def share(batch: list[int], labels: Labels, rank: int, processes: int) -> list[int]:
    """What one of several processes takes of a batch: its part of the labelled and of the unlabelled cases."""
    labelled = [index for index in batch if labels[index] >= 0]
    return labelled[rank::processes] + [index for index in batch if labels[index] < 0][rank::processes]


def strata_of(cases: Sequence[Case], columns: Sequence[str]) -> Labels:
    """(N,) number of each case's combination of values in these columns of the labels; what is missing is a value too.

    Raises:
        UsageError: a column that no case has.
    """
    for name in columns:
        if name not in OWN and not any(name in case.attributes for case in cases):
            raise UsageError(f"data.balance: no case has {name!r}. Give {', '.join(OWN)} or a column of the labels.")
    cells = [
        tuple(str((getattr(case, name) if name in OWN else case.attributes.get(name)) or "") for name in columns)
        for case in cases
    ]
    number = {cell: place for place, cell in enumerate(sorted(set(cells)))}
    return np.array([number[cell] for cell in cells], np.int64)


def _balanced(indices: Labels, strata: Labels, rng: np.random.RandomState) -> Labels:
    """As many draws as cases, every stratum alike: each case of one once before any of them again."""
    names = np.unique(strata)
    wanted = np.full(len(names), len(indices) // len(names))
    wanted[rng.permutation(len(names))[: len(indices) % len(names)]] += 1
    drawn = []
    for name, count in zip(names, wanted, strict=True):
        members = indices[strata == name]
        rounds = [members[rng.permutation(len(members))] for _ in range(-(-count // len(members)))]
        drawn.append(np.concatenate([members[:0], *rounds])[:count])
    mixed = np.concatenate(drawn)
    return mixed[rng.permutation(len(mixed))]


def _round_and_round(target: Labels, begin: int, seed: int) -> Iterator[int]:
    """Target cases in ever new order, from the place where the epochs before have come to."""
    number, within = divmod(begin, len(target))
    while True:
        order = target[draw(seed, TARGET_ROUNDS + number).permutation(len(target))]
        yield from order[within:].tolist()
        number, within = number + 1, 0
