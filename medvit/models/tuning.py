"""What of a backbone learns when it is tuned: all of it, nothing, a low-rank change of it, or a network beside it.

One switch, `model.tuning`: stages say how far up it applies (`trainable`), everything else works with each alike.
"""

from __future__ import annotations

from typing import Any, Literal

from medvit.config import ModelConfig
from medvit.models.backbone import Backbone
from medvit.models.synqt import SynQT
from medvit.records import UsageError


class Probed(Backbone):
    """A backbone that never learns: what pooling and head can make of it as it is."""

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """Nothing, whatever the stage says."""
        super().set_trainable("head", blocks)


class LowRank(Backbone):
    """A backbone whose query, key and value projections learn a change of low rank (LoRA, Hu et al. 2021, 2106.09685).

    Args:
        model: a timm ViT, changed in place.
        config: `rank` of the change, which is scaled by `lora_alpha` / rank.
        size: rows and columns it is built for, px.

    Raises:
        UsageError: peft is not installed, or the model has no such projections.
    """

    def __init__(self, model: Any, config: ModelConfig, size: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  an extra, and slow to import
        except ImportError:
            raise UsageError(
                "model.tuning lora needs the package peft: pip install 'medvit[lora]', or choose another model.tuning."
            ) from None
        settings = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=["qkv"])
        try:
            inject_adapter_in_model(settings, model)
        except ValueError:
            raise UsageError(
                f"model.tuning lora: {type(model).__name__} has no joint projection `qkv`. Choose a ViT, DeiT, DINOv2 "
                "or Swin as model.name, or another model.tuning."
            ) from None
        super().__init__(model, config, size)

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """The low-rank changes of all blocks, of the top blocks, or none; the model's own weights never."""
        super().set_trainable(trainable, blocks)
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                parameter.requires_grad_(False)


TUNINGS: dict[Literal["full", "linear", "lora", "synqt"], type[Backbone]] = {
    "full": Backbone,
    "linear": Probed,
    "lora": LowRank,
    "synqt": SynQT,
}
"""Name in the config -> what is made of the timm model."""
