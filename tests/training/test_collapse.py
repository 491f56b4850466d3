"""Rank and spread of features: by hand, on encoders that see, and on one that has given up."""

import numpy as np
import pytest
import torch

from medvit.config import ModelConfig
from medvit.inference import Encoder
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.records import Preprocessing
from medvit.training.collapse import effective_rank, examine, spread

PREP = Preprocessing(size=32)
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


def test_effective_rank_counts_directions_that_matter_alike():
    for count in (1, 3, 8):
        assert effective_rank(np.eye(8)[:count]) == pytest.approx(count)
    values = np.diag([3.0, 1.0])
    assert effective_rank(values) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert effective_rank(np.zeros((4, 3))) == 1


def test_spread_is_one_for_all_directions_and_zero_for_one():
    rng = np.random.default_rng(0)
    assert spread(rng.normal(size=(4000, 16))) == pytest.approx(1, abs=0.02)
    assert spread(np.outer(rng.uniform(1, 9, 50), rng.normal(size=16))) == pytest.approx(0, abs=1e-12)


def body_slices(count: int) -> np.ndarray:
    """Discs of different place, size and HU in air, with noise: int16 (count, 32, 32)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    slices = []
    for _ in range(count):
        hu = np.full((32, 32), -1000.0)
        for level in rng.uniform(-800, 400, 4):
            at, radius = rng.uniform(8, 24, 2), rng.uniform(4, 12)
            hu[(y - at[0]) ** 2 + (x - at[1]) ** 2 < radius**2] = level
        slices.append(hu + rng.normal(0, 20, hu.shape))
    return np.stack(slices).astype(np.int16)


def features_of(classifier: CtClassifier) -> np.ndarray:
    return Encoder(classifier, PREP, (0.5,) * 3, (0.5,) * 3).encode(body_slices(24))


def make_classifier(seed: int) -> CtClassifier:
    torch.manual_seed(seed)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=TINY)
    return build_classifier(config, size=32, channels=3, classes=1)[0]


@pytest.mark.parametrize("seed", range(4))
def test_random_encoders_have_not_collapsed(seed):
    assert not examine(features_of(make_classifier(seed))).collapsed


def test_an_encoder_that_gives_the_same_for_everything_has():
    classifier = make_classifier(0)
    with torch.no_grad():  # nothing of the picture gets in
        classifier.backbone.model.patch_embed.proj.weight.zero_()
    health = examine(features_of(classifier))
    assert health.collapsed
    assert health.rank == pytest.approx(1, abs=1e-3)
    assert health.spread == pytest.approx(0, abs=1e-5)


def test_few_features_are_never_a_collapse():
    """Of one slice the rank is 1 and the spread 0, whatever the encoder."""
    features = np.random.default_rng(0).normal(size=(8, 16))
    assert not any(examine(features[:count]).telling for count in range(1, 8))
    assert not any(examine(np.ones((count, 16))).collapsed for count in range(1, 8))
    assert examine(features).telling
    assert examine(np.ones((8, 16))).collapsed


def test_features_along_one_direction_have_collapsed_although_they_differ():
    rng = np.random.default_rng(0)
    line = np.outer(rng.choice([-1.0, 1.0], 40) * rng.uniform(1, 2, 40), rng.normal(size=16))
    health = examine(line)
    assert health.spread > 0.5
    assert health.collapsed
