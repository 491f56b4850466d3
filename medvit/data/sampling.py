"""Which cases make a batch: a function of seed and epoch alone, so that a resumed run and every process agree.

Labelled cases decide how long an epoch is. Unlabelled target cases join them in equal number and go round on their own:
neither is cut short by the other, whichever are more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from medvit.data.dataset import draw

Labels = npt.NDArray[np.int64]

TARGET_ROUNDS = 1 << 20
"""Where the numbering of rounds through the target cases begins: no epoch has that number."""


def epoch_batches(
    labels: Labels, epoch: int, *, batch_size: int, seed: int, balanced: bool = False, processes: int = 1
) -> list[list[int]]:
    """Batches of one epoch, each a list of indices for all processes together.

    All batches are of nearly the same size: no last one of a single case. Half of the cases in a batch are labelled
    where there are unlabelled ones (negative label), else all are.

    Args:
        labels: (N,) class index, negative for unlabelled target cases.
        epoch: from 0.
        batch_size: labelled cases per process.
        seed: of the shuffle.
        balanced: draw every class as often, the rare ones repeatedly.
        processes: that share a batch; each gets one case at least.

    Raises:
        ValueError: fewer labelled cases than processes, or none.
    """
    source, target = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    if not processes <= len(source):
        raise ValueError(f"{len(source)} labelled cases cannot be shared by {processes} processes")
    rng = draw(seed, epoch)
    order = _balanced(source, labels[source], rng) if balanced else source[rng.permutation(len(source))]
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


def _balanced(indices: Labels, labels: Labels, rng: np.random.RandomState) -> Labels:
    """As many draws as cases, every class alike: each case of a class once before any of them again."""
    classes = np.unique(labels)
    wanted = np.full(len(classes), len(indices) // len(classes))
    wanted[rng.permutation(len(classes))[: len(indices) % len(classes)]] += 1
    drawn = []
    for name, count in zip(classes, wanted, strict=True):
        members = indices[labels == name]
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
