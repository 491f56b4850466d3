"""The training loop: small, on Lightning Fabric, and ignorant of any method's name.

Per stage the optimizer is rebuilt for what is trainable; per step the learning rate follows warm-up and cosine; per
epoch a given function judges the model on validation cases, and the best epoch is kept. All random draws depend on
(seed, epoch, sample), so a run that was interrupted goes on where its last whole epoch ended.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from medvit.config import Stage, TrainingConfig
from medvit.data.dataset import CaseDataset, collate, epoch_order
from medvit.objectives.supervised import Objective
from medvit.records import MedvitError
from medvit.training import checkpoint
from medvit.training.waiting import WaitingClock, advice

Metrics = dict[str, float]

BACKBONE = "classifier.backbone."
RATES = {"head": "lr", "backbone": "lr_backbone"}
"""What the rows of metrics call the learning rate of a parameter group."""

_log = logging.getLogger(__name__)


@dataclass
class History:
    """What a fit has seen: one row of metrics per epoch, and which epoch was best by validation.

    `best_epoch` counts from 1 over all stages; 0 before any.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)


@dataclass(frozen=True)
class Run:
    """Where a fit writes, how it reports, and whether it continues.

    Attributes:
        folder: metrics.jsonl, TensorBoard events and checkpoints go here.
        resume: continue from the last checkpoint in `folder`, if there is one.
        stop_after: epochs after which to end, without validation (refit); None runs all stages.
        workers: loader processes.
        on_step: called after each step with its description.
        on_epoch: called with each row of metrics.
    """

    folder: Path
    resume: bool = False
    stop_after: int | None = None
    workers: int = 0
    on_step: Callable[[str], None] = lambda _: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None


def make_fabric(config: TrainingConfig) -> Fabric:
    """Device and precision: `auto` is 32-bit on CPUs without bf16 units and mixed where the hardware has it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = config.device
    precision: Any = config.precision
    if precision == "auto":
        on_gpu = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
        precision = "32-true" if not on_gpu else "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return Fabric(accelerator=accelerator, devices=1, precision=precision)


def fit(
    objective: Objective,
    dataset: CaseDataset,
    config: TrainingConfig,
    validate: Callable[[], Metrics],
    run: Run,
) -> History:
    """Train through all stages, and leave the best weights (the last, with `stop_after`) in the objective.

    Args:
        objective: what is trained; changed in place.
        dataset: training cases.
        config: stages, batch size, precision.
        validate: judges the current model; `auroc` decides the best epoch, then the lower `loss`.
        run: where and how.

    Raises:
        MedvitError: the loss or its gradient is not finite, or a checkpoint is of another configuration.
    """
    torch.manual_seed(config.seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(run.folder / "tensorboard")) as board:
        session = _Session(objective, dataset, config, validate, run, board)
        session.train()
    if told := advice(session.waiting, run.workers):
        _log.warning(told)
    if run.stop_after is None and config.select == "best":
        session.load_best()
    objective.eval()
    return session.history


class _Session:
    """The state of one fit."""

    def __init__(
        self,
        objective: Objective,
        dataset: CaseDataset,
        config: TrainingConfig,
        validate: Callable[[], Metrics],
        run: Run,
        board: SummaryWriter,
    ) -> None:
        self.objective, self.dataset, self.config, self.validate = objective, dataset, config, validate
        self.run, self.board = run, board
        self.fabric = make_fabric(config)
        self.history, self.waiting = History(), WaitingClock()
        self.epochs = sum(stage.epochs for stage in config.stages)
        self.steps = math.ceil(math.ceil(len(dataset) / config.batch_size) / config.accumulate)
        self.checkpoints = run.folder

    def train(self) -> None:
        if not self.run.resume:
            self._forget()
        resumed = self._resume()
        wanted = min(self.epochs, self.run.stop_after or self.epochs)
        first = 0
        for stage in self.config.stages:
            end = min(first + stage.epochs, wanted)
            if len(self.history.rows) < end:
                self._run_stage(stage, range(first, end), resumed)
                resumed = None
            first += stage.epochs

    def _run_stage(self, stage: Stage, epochs: range, resumed: tuple[dict[str, Tensor], Any] | None) -> None:
        self.objective.classifier.freeze_backbone(stage.trainable == "head")
        optimizer: Any = torch.optim.AdamW(parameter_groups(self.objective, stage))
        scheduler = LambdaLR(optimizer, warmup_cosine(stage, self.steps * stage.epochs))
        if resumed is not None and len(self.history.rows) > epochs.start:  # in the middle of this stage
            checkpoint.unpack_optimizer(optimizer, resumed[0], resumed[1]["optimizer"])
            scheduler.load_state_dict(resumed[1]["scheduler"])
        model, optimizer = self.fabric.setup(self.objective, optimizer)
        for epoch in range(max(epochs.start, len(self.history.rows)), epochs.stop):
            row = {"epoch": epoch + 1, "stage": stage.name}
            row |= self._run_epoch(model, optimizer, scheduler, epoch)
            self._finish_epoch(row, optimizer, scheduler)

    def _run_epoch(self, model: Any, optimizer: Any, scheduler: LambdaLR, epoch: int) -> Metrics:
        """One pass over the cases; returns the mean loss, the rates, and the share of waiting for input."""
        torch.manual_seed(self.config.seed * 100_003 + epoch)  # dropout and drop-path
        self.dataset.epoch = epoch
        loader = self.fabric.setup_dataloaders(self._loader(epoch))
        self.objective.train()
        total, count = 0.0, len(loader)
        for number, batch in enumerate(self.waiting.watch(loader)):
            # a last, shorter accumulation is averaged over the batches that it has
            group = number // self.config.accumulate
            in_group = min(self.config.accumulate, count - group * self.config.accumulate)
            closes = number + 1 == min((group + 1) * self.config.accumulate, count)
            progress = (epoch + number / count) / self.epochs
            with self.fabric.no_backward_sync(model, enabled=not closes):
                loss = model(batch, progress)["loss"]
                self.fabric.backward(loss / in_group)
            total += self._finite(float(loss.detach()), "loss", epoch)
            if closes:
                norm: Any = self.fabric.clip_gradients(
                    model, optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
                )
                # fp16's scaler meets infinite gradients by plan: it skips the step and lowers its scale
                if getattr(self.fabric.strategy.precision, "scaler", None) is None:
                    self._finite(float(norm), "gradient", epoch)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                self.objective.after_step()
            self.run.on_step(f"epoch {epoch + 1}/{self.epochs}  loss {total / (number + 1):.3f}")
        rates = {RATES[group["name"]]: group["lr"] for group in optimizer.param_groups}
        return {"loss": total / count, **rates, "waiting_share": self.waiting.last}

    def _loader(self, epoch: int) -> DataLoader[dict[str, Any]]:
        order = epoch_order(len(self.dataset), self.config.seed, epoch)
        return DataLoader(
            self.dataset,
            batch_size=self.config.batch_size,
            sampler=order,
            collate_fn=collate,
            num_workers=self.run.workers,
        )

    def _finite(self, value: float, what: str, epoch: int) -> float:
        if not math.isfinite(value):
            raise MedvitError(
                f"the {what} became {value} in epoch {epoch + 1}; the weights of the last whole epoch, if any, are in "
                f"{self.checkpoints}. Lower the learning rate (training.stages.0.lr) and start again."
            )
        return value

    def _finish_epoch(self, row: dict[str, Any], optimizer: Any, scheduler: LambdaLR) -> None:
        epoch = row["epoch"]
        if self.run.stop_after is None:
            judged = self.validate()
            row |= {f"val_{name}": value for name, value in judged.items()}
            score = (-math.inf if math.isnan(judged["auroc"]) else judged["auroc"], -judged["loss"])
            if self.config.select == "last" or score > self.history.best_score:
                self.history.best_score, self.history.best_epoch = score, epoch
                if self.config.select == "best":
                    checkpoint.save(self.checkpoints / "best.safetensors", self._weights(), {"epoch": epoch})
        self.history.rows.append(row)
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, epoch)
        write_metrics(self.run.folder / "metrics.jsonl", self.history.rows)
        self._save(optimizer, scheduler)
        self.run.on_epoch(row)

    def _save(self, optimizer: Any, scheduler: LambdaLR) -> None:
        tensors, groups = checkpoint.pack_optimizer(optimizer)
        tensors |= {f"objective.{name}": value for name, value in self._weights().items()}
        about = {
            "optimizer": groups,
            "scheduler": scheduler.state_dict(),
            "rows": self.history.rows,
            "best_epoch": self.history.best_epoch,
            "best_score": self.history.best_score,
        }
        checkpoint.save(self.checkpoints / "last.safetensors", tensors, about)

    def _forget(self) -> None:
        """Remove the checkpoints of an earlier fit, lest a later resume takes them for this one's."""
        for name in ("last.safetensors", "best.safetensors"):
            (self.checkpoints / name).unlink(missing_ok=True)

    def _resume(self) -> tuple[dict[str, Tensor], Any] | None:
        path = self.checkpoints / "last.safetensors"
        found = checkpoint.load(path)
        if found is None:
            if path.exists():
                _log.warning("%s is damaged: training starts again from its first epoch", path)
            return None
        tensors, about = found
        prefix = "objective."
        self._put({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        self.history = History(about["rows"], about["best_epoch"], tuple(about["best_score"]))
        return found

    def load_best(self) -> None:
        """Put the weights of the best epoch into the objective."""
        found = checkpoint.load(self.checkpoints / "best.safetensors")
        if found is None:
            raise MedvitError(
                f"{self.checkpoints}: the best weights are missing or damaged. Train again without --resume."
            )
        self._put(found[0])

    def _weights(self) -> dict[str, Tensor]:
        """What training can change: a backbone that no stage trains is not written again every epoch."""
        state = self.objective.state_dict()
        if any(stage.trainable != "head" for stage in self.config.stages):
            return state
        return {name: value for name, value in state.items() if not name.startswith(BACKBONE)}

    def _put(self, weights: dict[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self._weights().items()}
        if shapes != {name: value.shape for name, value in weights.items()}:
            raise MedvitError(f"{self.checkpoints}: made by another configuration. Train into a new folder.")
        self.objective.load_state_dict(weights, strict=False)


def write_metrics(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; what is not finite is null, for JSON has no other word for it."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            stream.write(json.dumps(finite, allow_nan=False) + "\n")


def warmup_cosine(stage: Stage, steps: int) -> Callable[[int], float]:
    """Factor on each group's peak rate at a step: linear warm-up, then half a cosine down to `min_lr`, then flat.

    The first step is already above zero, and no group rises again past the end.
    """
    warm = min(round(stage.warmup * steps), steps - 1)  # one step at least is at the peak

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1, steps - 1 - warm))
        return stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def parameter_groups(objective: Objective, stage: Stage) -> list[dict[str, Any]]:
    """Trainable parameters, each in exactly one group: backbone or not (its `name`), decayed or not.

    Biases, norms, tokens and position embeddings are not decayed.
    """
    backbone_lr = stage.backbone_lr if stage.backbone_lr is not None else stage.lr / 10
    backbone = objective.classifier.backbone
    ids = {id(parameter) for parameter in backbone.parameters()}
    spared = {f"{BACKBONE}model.{name}" for name in backbone.no_weight_decay()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in spared
            groups.setdefault((id(parameter) in ids, decayed), []).append(parameter)
    return [
        {
            "name": "backbone" if in_backbone else "head",
            "params": members,
            "lr": backbone_lr if in_backbone else stage.lr,
            "weight_decay": stage.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), members in groups.items()
    ]
