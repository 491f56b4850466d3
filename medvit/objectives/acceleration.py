"""Any objective with fewer tokens early in the training, and all of them at the end.

Early on, the gradients of different batches disagree so much that an exact one is wasted: a compressed one costs less,
and what it is off by does not show yet. Later that is what counts, so the schedule relaxes (Lin et al. 2024, arXiv
2410.22364). Losses are the objective's own, and so is what is judged: evaluation is never compressed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Literal

from torch import Tensor

from medvit.config import AccelerationConfig, AccelerationStep
from medvit.models.backbone import Backbone
from medvit.models.compression import NONE, Compression, check_compression, compressed
from medvit.objectives.objective import Batch, Objective
from medvit.records import UsageError


class Accelerated(Objective):
    """An objective whose backbone sees as little of each slice as the schedule says.

    Only the branch that learns, `classifier.backbone`, is compressed, and only while it learns; other backbones within
    the objective (a teacher, a momentum encoder) see whole slices, or as little as it does where the config says
    `symmetric`.

    Args:
        objective: any.
        config: the schedule.

    Raises:
        UsageError: the model has no tokens to drop, a patch does not fit it or the objective, or tokens become fewer
            again.
    """

    def __init__(self, objective: Objective, config: AccelerationConfig) -> None:
        super().__init__()
        self.objective = objective
        # past nn.Module's registration, which would give each of its parameters a second name in checkpoints
        self.__dict__["classifier"] = objective.classifier
        self.config, self.patches_vary = config, objective.patches_vary
        self._check()

    def totals(self, batch: Batch) -> Tensor:
        """The objective's own."""
        return self.objective.totals(batch)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The objective's own of compressed slices; `tokens_share` tells how many of its tokens the backbone saw.

        Raises:
            UsageError: the size of slices has changed, and a patch of the schedule does not divide it.
        """
        if self.classifier.backbone.size != self.checked_size:
            self._check()
        compression = compression_at(self.config.schedule, progress)
        with sparing(self.objective, compression, symmetric=self.config.symmetric):
            result: dict[str, Tensor] = self.objective(batch, progress)
        backbone = self.classifier.backbone
        seen = compression if backbone.training else NONE  # a frozen one sees whole slices
        return {**result, "tokens_share": result["loss"].new_tensor(seen.share(backbone.patch))}

    def rate_of(self, name: str) -> float:
        """The objective's own."""
        return self.objective.rate_of(name.removeprefix("objective."))

    def after_step(self) -> None:
        """The objective's own."""
        self.objective.after_step()

    def complete(self, progress: float) -> bool:
        """Not before it has seen whole slices for a while."""
        return progress > self.config.schedule[-1].from_progress and self.objective.complete(progress)

    def set_size(self, px: int) -> int:
        """The objective's own."""
        return self.objective.set_size(px)

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """The objective's own."""
        self.objective.set_trainable(trainable, blocks)

    def encoder(self) -> Backbone:
        """The objective's own."""
        return self.objective.encoder()

    def _check(self) -> None:
        backbone = self.classifier.backbone
        for step in self.config.schedule:
            if step.patch is not None and not self.patches_vary:
                raise UsageError(
                    f"objective.acceleration: {type(self.objective).__name__} tells pixels of patches of one size. "
                    "Accelerate it by `keep` alone."
                )
            check_compression(backbone.model, compression_of(step), backbone.size)
        check_relaxing(self.config.schedule, backbone.patch)
        self.checked_size = backbone.size


@contextmanager
def sparing(objective: Objective, compression: Compression, *, symmetric: bool) -> Iterator[None]:
    """Within, the backbone that learns sees compressed slices; other backbones of the objective whole ones.

    Args:
        objective: not accelerated itself.
        compression: of what its `classifier.backbone` sees in training mode.
        symmetric: the others (a teacher, a momentum encoder) see as little.
    """
    student = objective.classifier.backbone
    with ExitStack() as stack:
        stack.enter_context(compressed(student, compression))
        for module in objective.modules() if symmetric else ():
            if isinstance(module, Backbone) and module is not student:
                stack.enter_context(compressed(module, compression, resting=objective.training))
        yield


def compression_of(step: AccelerationStep) -> Compression:
    """What a step of a schedule compresses."""
    return Compression(step.keep, step.patch)


def compression_at(schedule: Sequence[AccelerationStep], progress: float) -> Compression:
    """Of the last step that has begun at a progress of 0..1."""
    begun = bisect_right([step.from_progress for step in schedule], progress)
    return compression_of(schedule[max(0, begun - 1)])


def check_relaxing(schedule: Sequence[AccelerationStep], own: int) -> None:
    """Refuse a schedule with fewer tokens later.

    Args:
        schedule: steps in their order.
        own: side of the model's own patch, px.

    Raises:
        UsageError: a step has fewer tokens than the one before.
    """
    shares = [compression_of(step).share(own) for step in schedule]
    for step, (before, after) in zip(schedule[1:], pairwise(shares), strict=True):
        if after < before * (1 - 1e-9):  # 0.28 of 1 and 0.07 of 4 are the same
            raise UsageError(
                f"objective.acceleration: {100 * after:.3g} % of the tokens from progress {step.from_progress:g} on, "
                f"and {100 * before:.3g} % before. Let the schedule relax: never fewer tokens than before."
            )
