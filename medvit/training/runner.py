"""What a training with labels and one without have in common: cases, where they write, and how a fit of theirs goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medvit.config import Config
from medvit.data.cache import SliceCache
from medvit.data.dataset import CaseDataset
from medvit.data.splits import NOBODY, Indices
from medvit.objectives import Objective
from medvit.records import Case
from medvit.training import processes
from medvit.training.loop import Run, fit
from medvit.training.material import Reporter
from medvit.training.state import History, Metrics

Watch = Callable[[Objective, CaseDataset], None]
"""Looks at what is trained, and at what it is trained on."""


class Validation(NamedTuple):
    """What judges the present model in a fit, and the numbers of the cases that it does it by."""

    judge: Callable[[], Metrics]
    cases: Indices = NOBODY


@dataclass
class Runner:
    """Everything that stays the same over the fits of a run.

    Attributes:
        config: the run's.
        cases: labelled or not.
        classes: names in order.
        slices: cache of prepared slices.
        folder: RUN.
        reporter: how to show progress.
        resume: continue what is in `folder`.
    """

    config: Config
    cases: Sequence[Case]
    classes: tuple[str, ...]
    slices: SliceCache
    folder: Path
    reporter: Reporter = field(default_factory=Reporter, kw_only=True)
    resume: bool = field(default=False, kw_only=True)

    def _fit(
        self,
        objective: Objective,
        dataset: CaseDataset,
        validation: Validation,
        folder: Path,
        name: str,
        *,
        watch: Watch | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        stop_after: int | None = None,
    ) -> History:
        """`fit` as the config says, with its progress shown.

        Args:
            objective: what is trained; `dataset` and `stop_after` as for `fit`.
            dataset: see there.
            validation: judges the present model.
            folder: of the checkpoints.
            name: shown with the progress.
            watch: called before the first epoch and after each.
            on_epoch: called with each row of metrics; None: the reporter is.
            stop_after: see there.
        """
        training = self.config.training
        labelled = int((dataset.labels >= 0).sum())
        batches = -(-labelled // (training.batch_size * processes.count()))
        self.reporter.start(name, batches * (stop_after or sum(stage.epochs for stage in training.stages)))
        if watch is not None:
            watch(objective, dataset)

        def judged() -> Metrics:
            if watch is not None:
                watch(objective, dataset)
            return validation.judge()

        run = Run(
            folder=folder,
            resume=self.resume,
            stop_after=stop_after,
            validation=[self.cases[index] for index in validation.cases],
            workers=self.config.data.workers,
            on_step=self.reporter.step,
            on_epoch=on_epoch or self.reporter.epoch,
        )
        return fit(objective, dataset, training, judged, run)
