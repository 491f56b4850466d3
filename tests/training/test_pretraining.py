"""fit() with objectives that learn without labels: the loop knows none of them, and goes on from any step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvit.config import (
    AccelerationConfig,
    AugmentConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainingConfig,
    Stage,
    TrainingConfig,
    ViewsConfig,
)
from medvit.data.slice_views import ViewDataset
from medvit.models.backbone import Backbone
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES, Objective, Task
from medvit.objectives.acceleration import Accelerated
from medvit.records import Case, Preprocessing
from medvit.training import loop
from medvit.training.loop import Run, fit
from medvit.training.optimizer import parameter_groups
from medvit.training.waiting import WaitingClock
from tests.training.fits import same, training, weights

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "proj_drop_rate": 0.2}
SMALL = PretrainingConfig(hidden=16, width=8, prototypes=12, decoder_width=32, decoder_depth=1, momentum=0.9)
VIEWS = {"mae": ViewsConfig(count=1), "dino": ViewsConfig(local=1, local_size=16)}
PREP = Preprocessing(windows=("lung",), size=32, train_slices=2)
METHODS = ("simclr", "mocov3", "dino", "mae")
WITH_A_COPY = ("mocov3", "dino")


def make_objective(name: str) -> Objective:
    torch.manual_seed(1)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=TINY, drop_path=0.2)
    classifier, _ = build_classifier(config, size=32, channels=1, classes=1)
    return OBJECTIVES[name](classifier, ObjectiveConfig(name=name, pretraining=SMALL), Task(()))


def make_dataset(name: str) -> ViewDataset:
    volumes = np.random.default_rng(0).normal(-400, 300, (6, 4, 32, 32)).astype(np.int16)
    cases = [Case(case_id=f"c{i}", patient_id=f"p{i}", group=f"p{i // 2}", root="", files=(str(i),)) for i in range(6)]
    views = VIEWS.get(name, ViewsConfig())
    return ViewDataset(
        cases, lambda case: volumes[int(case.files[0])], PREP, AugmentConfig(), views, (0.5,), (0.2,), seed=0
    )


def config(**settings: Any) -> TrainingConfig:
    rates = {"epochs": 1, "lr": 1e-3, "backbone_lr": 1e-3}
    stages = (Stage(name="small", size=16, **rates), Stage(**rates))
    return training(**{"stages": stages, "select": "last", "accumulate": 2, "checkpoint_minutes": 0, **settings})


def rank_only() -> dict[str, float]:
    return {"effective_rank": 2.0}


class Interrupted(Exception):  # noqa: N818  no error
    pass


def cut_at(batch: int, folder: Path) -> Run:
    left = [batch]

    def stop(_text: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    return Run(folder=folder, on_step=stop)


@pytest.mark.parametrize("batch", [2, 4])  # three batches in an epoch: steps of 2 and 1; the first stage ends at 3
@pytest.mark.parametrize("name", METHODS)
def test_interrupted_pretraining_goes_on_bit_for_bit(name, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WaitingClock", lambda: WaitingClock(lambda: 0.0))
    whole, cut, resumed = (make_objective(name) for _ in range(3))
    expected = fit(whole, make_dataset(name), config(), rank_only, Run(folder=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        fit(cut, make_dataset(name), config(), rank_only, cut_at(batch, tmp_path / "cut"))
    go_on = Run(folder=tmp_path / "cut", resume=True)
    history = fit(resumed, make_dataset(name), config(), rank_only, go_on)
    assert same(weights(resumed), weights(whole))
    assert history == expected
    assert history.rows[0]["val_effective_rank"] == 2


@pytest.mark.parametrize("name", WITH_A_COPY)
def test_the_slow_copy_is_in_checkpoints_and_in_no_optimizer(name, tmp_path):
    objective = make_objective(name)
    slow = {id(p) for key, p in objective.named_parameters() if key.startswith("slow_")}
    before = weights(objective)
    groups = parameter_groups(objective, Stage())
    assert slow
    assert not slow & {id(p) for group in groups for p in group["params"]}
    fit(objective, make_dataset(name), config(), rank_only, Run(folder=tmp_path))
    after = weights(objective)
    moved = [key for key in after if key.startswith("slow_") and not torch.equal(after[key], before[key])]
    assert any("blocks" in key for key in moved)
    assert objective.slow_backbone.size == 32  # the first stage was of 16
    assert not any(p.requires_grad for key, p in objective.named_parameters() if key.startswith("slow_"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["simclr", "mocov3", "dino"])
def test_fewer_tokens_early_go_with_every_method_that_compares_views(name, symmetric, tmp_path):
    steps = ({"from_progress": 0, "keep": 0.5}, {"from_progress": 0.6})
    acceleration = AccelerationConfig(schedule=steps, symmetric=symmetric)
    objective = Accelerated(make_objective(name), acceleration)
    history = fit(objective, make_dataset(name), config(), rank_only, Run(folder=tmp_path))
    shares = [row["tokens_share"] for row in history.rows]
    assert shares[0] == 0.5 < shares[1]
    sizes = {module.size for module in objective.modules() if isinstance(module, Backbone)}
    assert sizes == {32}  # the first stage was of 16
    assert objective.encoder() is objective.objective.encoder()


def test_pooling_and_head_stay_as_they_were(tmp_path):
    objective = make_objective("simclr")
    before = weights(objective)
    fit(objective, make_dataset("simclr"), config(), rank_only, Run(folder=tmp_path))
    after = weights(objective)
    outside = [key for key in after if key.startswith(("classifier.norm", "classifier.pooling", "classifier.head"))]
    assert outside
    assert all(torch.equal(after[key], before[key]) for key in outside)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gets_somewhere(name, tmp_path):
    """The loss of the last epochs is below that of the first."""
    stages = (Stage(epochs=12, lr=3e-3, backbone_lr=3e-3, warmup=0),)
    settings = config(stages=stages, batch_size=6, accumulate=1, checkpoint_minutes=9)
    history = fit(make_objective(name), make_dataset(name), settings, rank_only, Run(folder=tmp_path))
    losses = [row["loss"] for row in history.rows]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
