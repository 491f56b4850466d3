"""Stages through the front door: what moves in which, of a ViT of twelve blocks."""

from itertools import pairwise

import pytest
import torch

from medvit.config import ModelConfig, ObjectiveConfig, Stage, TrainingConfig
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES, Task
from medvit.training.loop import Run, fit

TWELVE = {"depth": 12, "embed_dim": 16, "num_heads": 2, "patch_size": 16}
STAGES = (
    Stage(name="head", trainable="head", epochs=1, lr=1e-2),
    Stage(name="top", trainable="top", blocks=2, epochs=1, lr=1e-2),
    Stage(name="all", epochs=1, lr=1e-2, layer_rates="decay"),
)


@pytest.fixture(scope="module")
def moved(make_dataset, tmp_path_factory) -> list[set[str]]:
    """Names of the backbone's parameters that moved, per stage."""
    torch.manual_seed(1)
    config = ModelConfig(name="deit_tiny_distilled_patch16_224", weights="none", options=TWELVE)
    classifier, _ = build_classifier(config, size=32, channels=3, classes=2)
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(), Task((3, 3)))
    model = classifier.backbone.model

    def weights() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.named_parameters()}

    seen = [weights()]
    training = TrainingConfig(stages=STAGES, batch_size=3, device="cpu", threads=1, select="last")
    run = Run(folder=tmp_path_factory.mktemp("run"), on_epoch=lambda _: seen.append(weights()))
    fit(objective, make_dataset(6), training, lambda: {"auroc": 0.5, "loss": 1.0}, run)
    return [{name for name in a if not torch.equal(a[name], b[name])} for a, b in pairwise(seen)]


def test_head_stage_moves_nothing_of_the_backbone(moved):
    assert moved[0] == set()


def test_top_stage_moves_the_last_two_blocks_and_the_final_norm(moved):
    assert {".".join(name.split(".")[:2]) for name in moved[1]} == {
        "blocks.10",
        "blocks.11",
        "norm.weight",
        "norm.bias",
    }


def test_blocks_unfrozen_later_move_and_so_do_embeddings_tokens_and_final_norm(moved):
    blocks = {name.split(".")[1] for name in moved[2] if name.startswith("blocks.")}
    assert blocks == {str(block) for block in range(12)}
    assert {"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} < moved[2]
