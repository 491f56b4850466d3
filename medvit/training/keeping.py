"""Which checkpoints of a fit are kept, and which of them is believed.

The last one and the one before it are kept, and the weights of the best epoch. At every instant one of the first two is
whole; what is damaged is told and passed over, and the steps since the other are taken again, to the same end.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from medvit.io.disk import require_room
from medvit.records import MedvitError
from medvit.training import checkpoint
from medvit.training.checkpoint import State

Stored = tuple[dict[str, Tensor], State]

_log = logging.getLogger(__name__)


class CheckpointFolder:
    """The checkpoints of one fit.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last, self.previous, self.best = (folder / f"{name}.safetensors" for name in ("last", "previous", "best"))

    def save(self, tensors: dict[str, Tensor], about: State) -> None:
        """Keep a state as the last one; the last becomes the previous one.

        Raises:
            DiskFullError: no room; both are as they were.
        """
        checkpoint.save(self.last, tensors, about, keep_as=self.previous)

    def save_best(self, tensors: dict[str, Tensor], epoch: int) -> None:
        """Keep the weights of the best epoch, from 1.

        Raises:
            DiskFullError: no room; the best so far are as they were.
        """
        checkpoint.save(self.best, tensors, {"epoch": epoch})

    def load_last(self) -> dict[str, Tensor]:
        """Tensors of the last state; raises as `load_best`."""
        return self._load(self.last)

    def load_best(self) -> dict[str, Tensor]:
        """Weights of the best epoch.

        Raises:
            MedvitError: missing or damaged.
        """
        return self._load(self.best)

    def _load(self, path: Path) -> dict[str, Tensor]:
        if (found := checkpoint.load(path)) is None:
            raise MedvitError(f"{path}: missing or damaged. Train again without --resume.")
        return found[0]

    def newest(self) -> Path | None:
        """The newest checkpoint to go on from; what is passed over is told. None: training starts."""
        if not (self.last.exists() or self.previous.exists()):
            return None
        for path in (self.last, self.previous):
            if (found := checkpoint.load(path)) is None:
                _log.warning("%s is %s", path, "damaged" if path.exists() else "missing")
            elif not self._has_best(found[1]):
                _log.warning("%s cannot be used: %s is missing or damaged", path, self.best.name)
            else:
                if path == self.previous:
                    _log.warning("training goes on from the checkpoint before the last, %s", path)
                return path
        _log.warning("%s has no whole checkpoint: training starts again from its first epoch", self.folder)
        return None

    def _has_best(self, about: State) -> bool:
        """Whether the best weights so far are there; those of a later epoch are made again when that is repeated."""
        if not about.get("selected"):
            return True
        best = checkpoint.load(self.best)
        return best is not None and best[1]["epoch"] >= about["best_epoch"]

    def forget_all_but(self, path: Path | None) -> None:
        """Remove what is not gone on from, lest a later save or resume takes it for good."""
        if path != self.last:
            self.last.unlink(missing_ok=True)
        if path is None:
            self.previous.unlink(missing_ok=True)
            self.best.unlink(missing_ok=True)

    def require_room(self, size: int) -> None:
        """Refuse to begin where two checkpoints of a size in bytes do not fit.

        Raises:
            DiskFullError: they do not.
        """
        require_room(self.folder, 2 * size, "two checkpoints")
