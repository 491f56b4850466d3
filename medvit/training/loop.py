"""The training loop: small, on Lightning Fabric, and ignorant of any method's name.

Per stage the size is set and the optimizer rebuilt for what is trainable; per step the learning rate follows the
stage's schedule; per epoch a given function judges the model on validation cases, and the best epoch is kept.

Batches are a function of seed and epoch, random draws of seed, epoch, case and micro-batch: a fit that was interrupted
at any step goes on from its last checkpoint to the same weights, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvit.config import Stage, TrainingConfig
from medvit.data.dataset import CaseDataset
from medvit.objectives import Objective
from medvit.records import Case, UsageError
from medvit.training.device import make_fabric
from medvit.training.divergence import broken, diverged
from medvit.training.feeding import Feeding, grouped
from medvit.training.journal import Board, write_metrics
from medvit.training.keeping import Stored
from medvit.training.resume import Recovery, identity
from medvit.training.stage import StageTraining
from medvit.training.state import History, Metrics, score_of
from medvit.training.step import Figures, MicroBatch, seed_for
from medvit.training.waiting import WaitingClock, advice

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Where a fit writes, how it reports, and whether it continues.

    Attributes:
        folder: metrics.jsonl, TensorBoard events and checkpoints go here.
        resume: continue from the last checkpoint in `folder`, if there is one.
        stop_after: epochs after which to end, without validation (refit); None runs all stages.
        validation: cases that `validate` judges by: a fit that is continued must have the same.
        workers: loader processes.
        on_step: called after each batch with its description, in the first process.
        on_epoch: called with each row of metrics, in the first process.
    """

    folder: Path
    resume: bool = False
    stop_after: int | None = None
    validation: Sequence[Case] = ()
    workers: int = 0
    on_step: Callable[[str], None] = lambda _: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None


def fit(
    objective: Objective,
    dataset: CaseDataset,
    config: TrainingConfig,
    validate: Callable[[], Metrics],
    run: Run,
) -> History:
    """Train through all stages, and leave the weights that the config selects in the objective.

    Under torchrun every process calls this with the same arguments.

    Args:
        objective: what is trained; changed in place. The size that its backbone has is the full one.
        dataset: training cases.
        config: stages, batch size, precision.
        validate: judges the current model, in every process alike: `auroc`, `loss` and, with `select: target`,
            `target_information`, as far as they are defined; whatever else it tells is written down.
        run: where and how.

    Raises:
        MedvitError: the loss or its gradient is not finite.
        UsageError: the checkpoint is of another configuration, the disk is full, there are fewer labelled cases than
            processes, or a stage asks for another size of features that were computed once.
    """
    session = _Session(objective, dataset, config, validate, run)
    session.train()
    session.finish()
    if session.first and (told := advice(session.waiting, run.workers)):
        _log.warning(told)
    return session.recovery.history


class _Session:
    """One fit."""

    def __init__(
        self,
        objective: Objective,
        dataset: CaseDataset,
        config: TrainingConfig,
        validate: Callable[[], Metrics],
        run: Run,
    ) -> None:
        self.objective, self.dataset, self.config, self.validate, self.run = objective, dataset, config, validate, run
        self.fabric, self.waiting = make_fabric(config), WaitingClock()
        self.first = self.fabric.is_global_zero
        self.epochs = sum(stage.epochs for stage in config.stages)
        self.wanted = min(self.epochs, run.stop_after or self.epochs)
        self.feeding = Feeding(dataset, config, rank=self.fabric.global_rank, processes=self.fabric.world_size)
        self.full = objective.classifier.backbone.size
        if dataset.transform is None and any(stage.size not in (None, self.full) for stage in config.stages):
            raise UsageError(
                "training.stages: features of a frozen backbone are computed once, at preprocessing.size. Leave out "
                "the sizes of stages, or set data.augment."
            )
        self.selects = run.stop_after is None and config.select != "last"
        own = identity(config, objective, dataset, validation=run.validation, processes=self.fabric.world_size)
        self.recovery = Recovery(self.fabric, objective, config, own, run.folder)
        if config.gradient_checkpointing:
            objective.classifier.set_gradient_checkpointing(True)
        if config.compile:
            objective.classifier.backbone.compile()  # in place: the names of weights stay as they are

    def train(self) -> None:
        """Go through what is left of the stages."""
        stored = self.recovery.begin(resume=self.run.resume)
        if self.first:
            self.board = Board(self.run.folder / "tensorboard", self.recovery.history.rows)
        begin = 0
        for stage in self.config.stages:
            epochs = range(begin, min(begin + stage.epochs, self.wanted))
            if self.recovery.position.epoch in epochs:
                self._run_stage(stage, epochs, stored)
                stored = None
            begin += stage.epochs

    def finish(self) -> None:
        """Leave the selected weights in the objective, at full size and in evaluation mode."""
        if self.config.ema and not self.selects:
            self.recovery.put_average()
        self.objective.set_size(self.full)
        if self.selects:
            self.recovery.put_best()
        self.objective.eval()

    def _run_stage(self, stage: Stage, epochs: range, stored: Stored | None) -> None:
        self.dataset.size = self.objective.set_size(stage.size or self.full)
        self.objective.set_trainable(stage.trainable, stage.blocks)
        training = StageTraining(self.fabric, self.objective, stage, self.config, self.feeding.steps)
        position = self.recovery.position
        if stored is not None and (position.epoch, position.steps) > (epochs.start, 0):
            training.unpack(*stored)
        else:
            position.enter_stage()
        while position.epoch in epochs:
            self._run_epoch(training, epochs)
            self._finish_epoch(training, stage, epochs)

    def _run_epoch(self, training: StageTraining, epochs: range) -> None:
        """Take the steps that are left of an epoch."""
        position = self.recovery.position
        self.dataset.epoch = position.epoch
        groups = self.feeding.groups(position.epoch)[position.steps :]
        loader = self.feeding.loader(groups, self.run.workers)
        self.objective.train()
        loaded = grouped(self.waiting.watch(loader), self.config.accumulate)
        for group, own in zip(groups, loaded, strict=True):
            training.set_rates((position.epoch - epochs.start) * self.feeding.steps + position.steps)
            self._run_step(training, group, own)

    def _run_step(self, training: StageTraining, group: list[list[int]], own: list[dict[str, Any]]) -> None:
        """One optimizer step on a group of batches; `own`: this process's part of each."""
        position = self.recovery.position
        epoch, begin = position.epoch, position.steps * self.config.accumulate
        micro = [
            MicroBatch(
                batch,
                progress=(epoch + number / self.feeding.batches) / self.epochs,
                seed=seed_for(self.config.seed, epoch, number, self.fabric.global_rank),
            )
            for number, batch in enumerate(own, begin)
        ]
        figures = training.gradient(micro, due=self.recovery.due())
        self._refuse_divergence(training, figures, group)
        training.move(skip=not figures.finite)
        skipped = {"skipped_share": float(not figures.finite)} if training.may_skip else {}
        position.add(sum(map(len, group)), figures.means | skipped)
        if figures.due:
            self.recovery.save(training, self.dataset.size)
        if self.first:
            for _ in own:
                self.run.on_step(f"epoch {epoch + 1}/{self.epochs}  loss {position.means()['loss']:.3f}")

    def _refuse_divergence(self, training: StageTraining, figures: Figures, group: list[list[int]]) -> None:
        position = self.recovery.position
        position.skipped = 0 if figures.finite else position.skipped + 1
        if found := broken(figures, group, skipped=position.skipped, may_skip=training.may_skip):
            raise diverged(
                *found, self.dataset, epoch=position.epoch, stages=self.config.stages, folder=self.run.folder
            )

    def _finish_epoch(self, training: StageTraining, stage: Stage, epochs: range) -> None:
        """Judge the epoch, and stand before the next."""
        position, history = self.recovery.position, self.recovery.history
        row = {"epoch": position.epoch + 1, "stage": stage.name, **position.means(), **training.rates()}
        row["waiting_share"] = self.waiting.last
        if self.run.stop_after is None:
            row |= {f"val_{name}": value for name, value in self._judge(training).items()}
        history.rows.append(self.fabric.broadcast(row))
        ended = bool(self.config.patience) and position.stale >= self.config.patience
        position.enter(epochs.stop if ended else position.epoch + 1)
        if self.first:
            write_metrics(self.run.folder / "metrics.jsonl", history.rows)
            self.board.add(row)
        self.recovery.save(training, self.dataset.size)
        if self.first:
            self.run.on_epoch(row)

    def _judge(self, training: StageTraining) -> Metrics:
        """Validate, and keep the weights where they are the best so far.

        Weights of another size do not compare, nor do those of an objective that is not complete yet.
        """
        position, history = self.recovery.position, self.recovery.history
        with training.averaged():
            judged = self.fabric.broadcast(self.validate())
            if self.dataset.size == self.full and self.objective.complete((position.epoch + 1) / self.epochs):
                score = score_of(judged, with_target=self.config.select == "target")
                position.judge(score)
                if not self.selects or history.best_epoch == 0 or score > history.best_score:
                    history.best_epoch, history.best_score = position.epoch + 1, score
                    if self.selects:
                        self.recovery.save_best()
        return judged
