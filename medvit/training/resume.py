"""The state of a fit in its checkpoints: when it is saved, what it holds, and whether it is of this very fit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from medvit.config import TrainingConfig
from medvit.data.dataset import CaseDataset
from medvit.objectives import Objective
from medvit.records import Case, MedvitError, UsageError
from medvit.training import checkpoint
from medvit.training.checkpoint import prefixed, under
from medvit.training.keeping import CheckpointFolder, Stored
from medvit.training.optimizer import BACKBONE
from medvit.training.stage import StageTraining
from medvit.training.state import History, Position

Identity = dict[str, Any]
"""What must be the same for a fit to go on to the same end."""


def identity(
    config: TrainingConfig, objective: Objective, dataset: CaseDataset, *, validation: Sequence[Case], processes: int
) -> Identity:
    """Of a fit: its settings, what it begins with, its cases, how they are drawn and shared, who judges. JSON-able.

    Args:
        config: of the training.
        objective: untrained: a backbone that no stage trains is in no checkpoint, and other weights may stand under
            its name now.
        dataset: training cases.
        validation: cases that choose the epoch, with their labels.
        processes: that share the batches.
    """
    labels, domains = dataset.labels.tolist(), dataset.domains.tolist()
    cases = [(case.case_id, case.codes) for case in dataset.cases]  # codes: whether values were taken for HU
    strata = None if dataset.strata is None else dataset.strata.tolist()
    return {
        "processes": processes,
        "cases": _digest(cases, labels, domains, strata),
        "validation": _digest([(case.case_id, case.label, case.codes) for case in validation]),
        "weights": "" if trains_backbone(config) else digest_of(objective.classifier.backbone),
        **config.model_dump(mode="json"),
    }


def trains_backbone(config: TrainingConfig) -> bool:
    """Whether any stage does; else checkpoints are without it."""
    return any(stage.trainable != "head" for stage in config.stages)


def digest_of(module: nn.Module) -> str:
    """sha256 of all weights and buffers, with their names."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


class Recovery:
    """Saves the state of a fit and restores it. Only the first process writes; all of them wait for it.

    Args:
        fabric: device, precision, processes.
        objective: what is trained.
        config: of the training.
        own: identity of the fit.
        folder: of the checkpoints.

    Attributes:
        history: what the fit has seen.
        position: where it stands.
        selected: whether weights of a best epoch were kept.
    """

    def __init__(
        self, fabric: Fabric, objective: Objective, config: TrainingConfig, own: Identity, folder: Path
    ) -> None:
        self.fabric, self.objective, self.config, self.identity = fabric, objective, config, own
        self.checkpoints = CheckpointFolder(folder)
        self.history, self.position = History(), Position()
        self.selected = False
        self.saved_at = time.monotonic()

    def begin(self, *, resume: bool) -> Stored | None:
        """Restore what there is, if that is asked for, and forget what is not gone on from.

        Returns:
            the checkpoint, for the optimizer of its stage; None where training starts.

        Raises:
            UsageError: the checkpoint is of another fit, or there is no room for new ones.
        """
        if self.fabric.is_global_zero:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            size = sum(value.nbytes for value in self._weights().values())
            # AdamW keeps two moments of each weight, and there may be an average
            self.checkpoints.require_room(size * (4 if self.config.ema else 3))
        newest = self.checkpoints.newest() if resume and self.fabric.is_global_zero else None
        newest = self.fabric.broadcast(newest)
        stored = self._restore(newest) if newest else None
        self.fabric.barrier()  # all have read it
        if self.fabric.is_global_zero:
            self.checkpoints.forget_all_but(newest)
        return stored

    def due(self) -> bool:
        """Whether this process wants a checkpoint."""
        waited = time.monotonic() - self.saved_at
        return self.fabric.is_global_zero and waited >= 60 * self.config.checkpoint_minutes

    def save(self, training: StageTraining, size: int) -> None:
        """Keep the state at an optimizer step; `size`: of the backbone, px."""
        if self.fabric.is_global_zero:
            tensors, about = training.pack()
            about |= {
                **asdict(self.history),
                "selected": self.selected,
                "position": asdict(self.position),
                "size": size,
                "threads": torch.get_num_threads(),
                "identity": self.identity,
            }
            self.checkpoints.save(prefixed("objective", self._weights()) | tensors, about)
            self.saved_at = time.monotonic()
        self.fabric.barrier()

    def save_best(self) -> None:
        """Keep the weights as those of the best epoch."""
        self.selected = True
        if self.fabric.is_global_zero:
            self.checkpoints.save_best(self._weights(), self.history.best_epoch)

    def put_best(self) -> None:
        """Put the weights of the best epoch into the objective.

        Raises:
            MedvitError: missing or damaged.
        """
        self._put(self.checkpoints.load_best())

    def put_average(self) -> None:
        """Put the averaged weights of the last checkpoint into the objective.

        Raises:
            MedvitError: missing or damaged.
        """
        self.objective.load_state_dict(under("average", self.checkpoints.load_last()), strict=False)

    def _restore(self, path: Path) -> Stored:
        if (stored := checkpoint.load(path)) is None:
            raise MedvitError(f"process {self.fabric.global_rank} cannot read {path}: all need the same folder.")
        tensors, about = stored
        self._refuse_other(about.get("identity", {}))
        torch.set_num_threads(about["threads"])  # sums depend on how they are shared between threads
        self.objective.set_size(about["size"])
        self._put(under("objective", tensors))
        self.history = History(about["rows"], about["best_epoch"], tuple(about["best_score"]))
        self.selected, at = about["selected"], about["position"]
        self.position = Position(**{**at, "stage_score": tuple(at["stage_score"])})
        return stored

    def _refuse_other(self, kept: Identity) -> None:
        folder, own = self.checkpoints.folder, self.identity
        if kept.get("processes", own["processes"]) != own["processes"]:
            raise UsageError(
                f"{folder}: was trained by {kept['processes']} processes, whose batches {own['processes']} cannot go "
                f"on with. Start {kept['processes']} (torchrun --nproc-per-node), or train into a new folder."
            )
        if other := [name for name, value in own.items() if kept.get(name) != value]:
            raise UsageError(f"{folder}: made by another configuration ({', '.join(other)}). Train into a new folder.")

    def _weights(self) -> dict[str, Tensor]:
        """What training can change: a backbone that no stage trains is not written again every time."""
        state = self.objective.state_dict()
        if trains_backbone(self.config):
            return state
        return {name: value for name, value in state.items() if not name.startswith(BACKBONE)}

    def _put(self, weights: dict[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self._weights().items()}
        if shapes != {name: value.shape for name, value in weights.items()}:
            folder = self.checkpoints.folder
            raise UsageError(f"{folder}: made by another configuration (the model). Train into a new folder.")
        self.objective.load_state_dict(weights, strict=False)
