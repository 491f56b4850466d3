"""Miniature fits: a ViT of one block on noise whose level tells the class."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from medvit.config import ModelConfig, ObjectiveConfig
from medvit.data.dataset import CaseDataset
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES
from medvit.objectives.supervised import Objective
from medvit.records import Case

TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16}
RANDOM = {**TINY, "depth": 2, "proj_drop_rate": 0.2}

MakeObjective = Callable[..., Objective]


@pytest.fixture(scope="session")
def make_objective() -> MakeObjective:
    def make(*, random: bool = False, counts: tuple[int, ...] = (3, 3), **settings: Any) -> Objective:
        torch.manual_seed(1)
        noise = {"dropout": 0.3, "drop_path": 0.3, "options": RANDOM} if random else {"options": TINY}
        config = ModelConfig(name="vit_tiny_patch16_224", weights="none", **noise)
        classifier, _ = build_classifier(config, size=32, channels=3, classes=len(counts))
        return OBJECTIVES["supervised"](classifier, ObjectiveConfig(class_weights=False, **settings), counts)

    return make


@pytest.fixture(scope="session")
def make_dataset() -> Callable[[int], CaseDataset]:
    """Ready slices (Z, C, H, W): the loop needs no files."""

    def make(count: int = 6) -> CaseDataset:
        labels = np.arange(count) % 2
        rng = np.random.default_rng(0)
        volumes = rng.normal(size=(count, 3, 3, 32, 32)).astype(np.float32) + labels[:, None, None, None, None]
        cases = [
            Case(case_id=f"c{i}", patient_id=f"p{i}", group=f"p{i}", root="", files=(str(i),)) for i in range(count)
        ]
        return CaseDataset(cases, lambda case: volumes[int(case.files[0])], labels, slices=2, transform=None, seed=0)

    return make
