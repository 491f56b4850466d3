"""Who takes part in `recipe.py`: shipped configs, each with the same seconds to spend, and on what it spends them.

Epochs follow from seconds by `SPEED`, measured once beforehand, so that every machine runs the same epochs and only the
seconds differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medvit.config import Config, load_config

SPEED: Mapping[tuple[str, str, int], float] = {
    ("vit", "head", 56): 72.0,
    ("vit", "head", 70): 50.0,
    ("vit", "head", 98): 31.0,
    ("vit", "head", 126): 20.0,
    ("vit", "top", 56): 41.0,
    ("vit", "top", 70): 31.0,
    ("vit", "top", 98): 21.0,
    ("vit", "top", 126): 13.0,
    ("vit", "all", 56): 21.0,
    ("vit", "all", 70): 16.5,
    ("vit", "all", 98): 10.4,
    ("vit", "all", 126): 6.6,
    ("resnet50", "all", 98): 10.2,
    ("test_vit", "head", 56): 800.0,
    ("test_vit", "head", 98): 700.0,
    ("test_vit", "top", 56): 700.0,
    ("test_vit", "top", 98): 600.0,
    ("test_vit", "all", 56): 600.0,
    ("test_vit", "all", 98): 500.0,
}
"""Training images per second of one thread, fp32: (architecture, what is trained, px, about)."""

SIZE = 98
"""Side of the pictures, px, unless a contender says otherwise."""


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        config: name of the shipped config.
        shares: of the seconds, per stage of the config; none: a frozen backbone, whose epochs cost next to nothing.
        small: px of all stages but the last; None: the same as there.
        size: px at the end.
        settings: config key -> value, over the config.
        against: the contender whose difference to it tells what one step is worth.
    """

    config: str
    shares: tuple[float, ...] = ()
    small: int | None = None
    size: int = SIZE
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None

    def resolve(self, settings: Mapping[str, Any], seconds: float, images: int, faster: float = 1.0) -> Config:
        """The config of a run.

        Args:
            settings: of the set of cases, and of the run.
            seconds: to spend.
            images: of an epoch.
            faster: how many times as fast backbones learn as the configs say, which are for ViT-S.
        """
        wanted = {"preprocessing.size": self.size, "training.select": "last", **settings, **self.settings}
        config = configured(self.config, wanted)
        kind = next((name for name in ("resnet50", "test_vit") if config.model.name.startswith(name)), "vit")
        for number, share in enumerate(self.shares):
            stage, last = config.training.stages[number], number + 1 == len(self.shares)
            px = self.size if last or self.small is None else self.small
            epochs = max(1, round(seconds * share * SPEED[kind, stage.trainable, px] / images))
            key = f"training.stages.{number}"
            wanted |= {f"{key}.epochs": epochs, f"{key}.size": "null" if px == self.size else px}
            wanted |= {f"{key}.backbone_lr": faster * (stage.backbone_lr or stage.lr / 10)}
        return configured(self.config, wanted)


def configured(name: str, settings: Mapping[str, Any]) -> Config:
    """A shipped config with some values changed."""
    return load_config(name, [f"{key}={value}" for key, value in settings.items()])


RATES = {"training.stages.2.layer_rates": "decay", "training.stages.2.backbone_lr": 1e-4}
"""Each block 0.75 times as fast as the one above; those in the middle learn about as fast as all do in `staged`."""

RANDOM = {"model.weights": "none", "training.stages.0.backbone_lr": 3e-4}
"""Weights that have seen nothing must move further."""

STAGES = (0.14, 0.275, 0.585)
"""Shares of the time of head, top and all."""

CONTENDERS: Mapping[str, Contender] = {
    "frozen probe": Contender("frozen"),
    "frozen probe, 224 px": Contender("frozen", size=224, against="frozen probe"),
    "full": Contender("baseline", (1.0,), against="frozen probe"),
    "staged": Contender("staged", STAGES, against="full"),
    "staged + rates": Contender("staged", STAGES, settings=RATES, against="staged"),
    "progressive": Contender("progressive", (0.065, 0.14, 0.4, 0.395), 56, against="staged + rates"),
    "mixup and CutMix": Contender(
        "staged", STAGES, settings=RATES | {"objective.mixup": 0.2, "objective.cutmix": 1.0}, against="staged + rates"
    ),
    "ViT, random weights": Contender("baseline", (1.0,), settings=RANDOM, against="full"),
    "ResNet-50, random weights": Contender(
        "baseline",
        (1.0,),
        settings=RANDOM | {"model.name": "resnet50", "model.drop_path": 0.0},
        against="ViT, random weights",
    ),
    "126 px": Contender("staged", (0.2, 0.46, 0.94), size=126, settings=RATES, against="staged + rates"),
    "70 to 126 px": Contender("progressive", (0.085, 0.2, 0.25, 0.32), 70, size=126, against="126 px"),
}
"""From simple to complex; progressive resizing, mixup and CutMix are each added to stages with layer-wise rates."""

CONSTANT, GROWING = "126 px", "70 to 126 px"
"""The pair of the claim on progressive resizing, at sizes that a ViT-S feels: as many epochs, in less time."""

UNTRAINED = ("ViT, random weights", "ResNet-50, random weights")
"""For one round only: ResNet-50 has no other weights here, and what starts from them is no rival."""
