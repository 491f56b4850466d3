"""Training that has come apart: a loss or a gradient that is no number, and the cases that it happened on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from medvit.config import Stage
from medvit.data.dataset import CaseDataset
from medvit.records import MedvitError
from medvit.training.step import Figures

SKIPPED_IN_A_ROW = 20
"""Steps that fp16 may leave out one after the other, to find its scale, before training counts as diverged."""

NAMED = 5
"""Cases that an error names at most."""


def broken(
    figures: Figures, batches: Sequence[Sequence[int]], *, skipped: int, may_skip: bool
) -> tuple[str, list[int]] | None:
    """What of a step is no number, and the indices of the cases it was computed from; None where training goes on.

    Args:
        figures: of the step.
        batches: indices of the cases of each micro-batch, of all processes.
        skipped: steps in a row with an infinite gradient, this one included.
        may_skip: fp16 leaves such steps out by plan.
    """
    for loss, batch in zip(figures.losses, batches, strict=True):
        if not math.isfinite(loss):
            return f"loss became {loss}", list(batch)
    if skipped >= (SKIPPED_IN_A_ROW if may_skip else 1):
        return f"gradient became {figures.norm}", [index for batch in batches for index in batch]
    return None


def diverged(
    what: str, indices: Sequence[int], dataset: CaseDataset, *, epoch: int, stages: Sequence[Stage], folder: Path
) -> MedvitError:
    """The error that says what happened, on which cases (by their hashed ids), what is kept, and what to do.

    Args:
        what: is no number.
        indices: of the cases.
        dataset: which they are of.
        epoch: from 0 over all stages.
        stages: of the training.
        folder: of the checkpoints.
    """
    ids = [dataset.cases[index].case_id for index in indices]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    ends = [sum(stage.epochs for stage in stages[: number + 1]) for number in range(len(stages))]
    number = next(number for number, end in enumerate(ends) if epoch < end)
    return MedvitError(
        f"the {what} in epoch {epoch + 1}, on cases {', '.join(ids[:NAMED])}{more}. The last good checkpoint is kept "
        f"in {folder}. Look at these cases, or lower the learning rate (training.stages.{number}.lr) and start again."
    )
