"""What fewer tokens cost each class: a small finding is lost, and the mean over all cases does not show it."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from medvit.config import EvaluationConfig, ModelConfig, ObjectiveConfig
from medvit.evaluation.decision import measure_gain
from medvit.evaluation.predictions import check_predictions
from medvit.models.classifier import build_classifier
from medvit.objectives import Task, build_objective

CLASSES = ("none", "large", "small")
SHARES = (0.45, 0.45, 0.1)
HEAVY = {"schedule": [{"from_progress": 0, "keep": 0.05}, {"from_progress": 0.9}]}
STEPS = 150


def phantom(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with nothing, with a bright half, or with one bright patch of 64 (count, 1, 1, 64, 64); and classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=count, p=SHARES)
    pictures = rng.normal(0, 0.3, size=(count, 1, 1, 64, 64)).astype(np.float32)
    for picture, label in zip(pictures, labels, strict=True):
        if label == 1:
            picture[..., : 64 // 2, :] += 1
        if label == 2:
            row, column = 8 * rng.integers(8, size=2)
            picture[..., row : row + 8, column : column + 8] += 2
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def trained(acceleration: dict | None) -> pd.DataFrame:
    """Predictions on new pictures of a small ViT that was trained with so many tokens."""
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=options)
    classifier, _ = build_classifier(config, size=64, channels=1, classes=3)
    learning = ObjectiveConfig(acceleration=acceleration, class_weights=False)
    objective = build_objective(classifier, learning, Task((45, 45, 10))).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    for step in range(STEPS):
        pictures, labels = phantom(48, 1000 + step)
        batch = {"input": pictures, "label": labels, "mask": torch.ones(48, 1, dtype=torch.bool)}
        objective({**batch, "totals": objective.totals(batch)}, step / STEPS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    pictures, labels = phantom(300, 1)
    objective.eval()
    with torch.no_grad():
        shares = classifier(pictures, torch.ones(300, 1, dtype=torch.bool)).logits.softmax(dim=1).double()
    columns = {f"p_{name}": shares[:, index].numpy() for index, name in enumerate(CLASSES)}
    ids = [f"c{number}" for number in range(300)]
    frame = pd.DataFrame({"case_id": ids, "patient_id": ids, "label": [CLASSES[k] for k in labels], **columns})
    return check_predictions(frame)


@pytest.fixture(scope="module")
def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    return trained(HEAVY), trained(None)


def test_a_small_finding_that_is_lost_shows_in_its_class(frames):
    gain = measure_gain(*frames, "whole slices", EvaluationConfig(bootstrap=200))
    right = float((frames[0]["label"] == frames[0]["predicted"]).mean())
    assert right > 0.85  # all in all it looks well: one case in ten is of the class that is lost
    assert gain.recall["small"].high < -0.5
    assert gain.recall["large"].point > -0.05
    assert gain.recall["none"].point > -0.05
