"""Miniature fits: a ViT of one or two blocks on noise whose level tells the class."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medvit.config import ModelConfig, ObjectiveConfig, Stage, TrainingConfig
from medvit.data.dataset import CaseDataset, collate
from medvit.models.classifier import build_classifier
from medvit.objectives import Objective, Task, build_objective
from medvit.records import Case
from medvit.training.checkpoint import load

TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16}
RANDOM = {**TINY, "depth": 2, "proj_drop_rate": 0.2}

BACKBONE = "classifier.backbone."
HEAD_THEN_ALL = (Stage(name="head", trainable="head", epochs=2, lr=1e-2), Stage(name="all", epochs=2, lr=1e-2))

Weights = dict[str, Tensor]
Validate = Callable[[], dict[str, float]]


def make_objective(
    *, random: bool = False, counts: tuple[int, ...] = (3, 3), model: str = "vit_tiny_patch16_224", **settings: Any
) -> Objective:
    """The same weights every time; `random`: with dropout and drop-path."""
    torch.manual_seed(1)
    options = (RANDOM if random else TINY) if model.startswith("vit") else {}
    noise = {"dropout": 0.3, "drop_path": 0.3} if random else {}
    config = ModelConfig(name=model, weights="none", options=options, **noise)
    classifier, _ = build_classifier(config, size=32, channels=3, classes=len(counts))
    settings = {"class_weights": False, **settings}
    return build_objective(classifier, ObjectiveConfig(**settings), Task(counts))


class Channels:
    """As a training transform: three channels, with random noise."""

    def set_random_state(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)

    def __call__(self, slices: Any) -> Tensor:
        noise = self.rng.normal(size=(len(slices), 3, *slices.shape[1:]))
        return torch.from_numpy((slices[:, None] + noise).astype(np.float32))


def make_dataset(count: int = 6, *, labels: list[int] | None = None, augmented: bool = False) -> CaseDataset:
    """Ready slices (Z, C, H, W): the loop needs no files; `augmented`: (Z, H, W) and a random transform."""
    classes = np.array(labels) if labels is not None else np.arange(count) % 2
    rng = np.random.default_rng(0)
    shape = (len(classes), 3, 32, 32) if augmented else (len(classes), 3, 3, 32, 32)
    level = classes.reshape(-1, *[1] * (len(shape) - 1))
    volumes = rng.normal(size=shape).astype(np.float32) + level.astype(np.float32)
    cases = [
        Case(case_id=f"c{i}", patient_id=f"p{i}", group=f"p{i}", root="", files=(str(i),)) for i in range(len(classes))
    ]
    transform: Any = (lambda _: Channels()) if augmented else None
    return CaseDataset(cases, lambda case: volumes[int(case.files[0])], classes, slices=2, transform=transform, seed=0)


def training(**settings: Any) -> TrainingConfig:
    return TrainingConfig(
        **{"stages": (Stage(epochs=1, lr=1e-2),), "batch_size": 2, "device": "cpu", "threads": 1, **settings}
    )


def scripted(*rows: tuple[float, float]) -> Validate:
    """Validation that says (auroc, loss) of each epoch in turn."""
    script: Iterator[tuple[float, float]] = iter(rows)

    def validate() -> dict[str, float]:
        auroc, loss = next(script)
        return {"auroc": auroc, "loss": loss}

    return validate


def rising() -> Validate:
    """The last epoch is always best."""
    return scripted(*((0.1 + k / 100, 1.0) for k in range(50)))


def judged(objective: Objective) -> Validate:
    """Figures that depend on the weights, and on nothing else."""
    batch = collate([make_dataset(4)[i] for i in range(4)])

    def validate() -> dict[str, float]:
        objective.eval()
        size = objective.classifier.backbone.size
        with torch.no_grad():
            logits = objective.classifier(batch["input"][..., :size, :size], batch["mask"]).logits
        margin = logits[range(4), batch["label"]] - logits[range(4), 1 - batch["label"]]
        return {"auroc": float(margin.sin().mean()), "loss": float(nn.functional.cross_entropy(logits, batch["label"]))}

    return validate


def weights(module: nn.Module) -> Weights:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def first_moments(folder: Path) -> Weights:
    """What AdamW has averaged of the gradients; after one step a tenth of the gradient itself."""
    tensors, _ = load(folder / "last.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith("exp_avg")}
