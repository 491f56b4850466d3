from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvit.config import ModelConfig, ObjectiveConfig, Stage
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES
from medvit.training.loop import parameter_groups, warmup_cosine

MODELS = {
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16},
    "vit_small_patch14_reg4_dinov2": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12},
}
STAGE = Stage(lr=1e-3, backbone_lr=1e-5, weight_decay=0.3)

schedules = st.tuples(
    st.builds(Stage, warmup=st.floats(0, 0.99), min_lr=st.floats(0, 1)), st.integers(min_value=1, max_value=400)
)


def rates(stage: Stage, steps: int, beyond: int = 0) -> list[float]:
    factor = warmup_cosine(stage, steps)
    return [factor(step) for step in range(steps + beyond)]


@given(schedules)
def test_first_step_moves_the_weights(schedule):
    stage, steps = schedule
    assert steps == 1 or stage.min_lr == 0 or rates(stage, steps)[0] > 0
    assert rates(Stage(warmup=stage.warmup), steps)[0] > 0


@given(schedules)
def test_peak_is_reached_and_never_passed(schedule):
    assert max(rates(*schedule)) == pytest.approx(1)


@given(schedules)
def test_rate_rises_to_the_peak_and_then_only_falls(schedule):
    found = rates(*schedule, beyond=50)
    peak = found.index(max(found))
    assert all(a <= b for a, b in pairwise(found[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(found[peak:]))


@given(schedules)
def test_past_the_end_it_stays_at_the_minimum(schedule):
    stage, steps = schedule
    assert rates(stage, steps, beyond=50)[steps:] == pytest.approx([stage.min_lr] * 50)


@pytest.mark.parametrize("steps", [20, 200])
def test_last_step_is_at_the_minimum(steps):
    assert rates(Stage(min_lr=0.01), steps)[-1] == pytest.approx(0.01)


def test_warm_up_is_linear_over_its_share_of_steps():
    assert rates(Stage(warmup=0.1), 100)[:12] == pytest.approx([*(k / 11 for k in range(1, 12)), 1], abs=1e-3)


def test_minimum_is_a_share_of_each_groups_own_peak(objective):
    optimizer = torch.optim.AdamW(parameter_groups(objective, STAGE))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(Stage(min_lr=0.01), 10))
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    assert {round(group["lr"], 12) for group in optimizer.param_groups} == {1e-5, 1e-7}


@pytest.fixture(scope="module", params=MODELS)
def objective(request):
    torch.manual_seed(0)
    config = ModelConfig(name=request.param, weights="none", options=MODELS[request.param])
    classifier, _ = build_classifier(config, size=32, channels=3, classes=2)
    return OBJECTIVES["supervised"](classifier, ObjectiveConfig(), [1, 1])


def setting(objective, stage: Stage, key: str) -> dict[str, float]:
    """Parameter name -> what its group says."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {names[id(p)]: group[key] for group in parameter_groups(objective, stage) for p in group["params"]}


def test_each_trainable_parameter_is_in_exactly_one_group(objective):
    members = [id(p) for group in parameter_groups(objective, STAGE) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in objective.parameters())


def test_frozen_parameters_are_in_no_group(objective):
    objective.classifier.freeze_backbone(True)
    names = set(setting(objective, STAGE, "lr"))
    objective.classifier.freeze_backbone(False)
    assert names == {name for name, _ in objective.named_parameters() if ".backbone." not in name}


def test_norms_biases_tokens_and_positions_are_not_decayed(objective):
    spared = ("bias", "norm", "pos_embed", "cls_token", "reg_token", "gamma", "relative_position_bias_table")
    for name, decay in setting(objective, STAGE, "weight_decay").items():
        assert decay == (0 if any(part in name for part in spared) else 0.3), name


def test_backbone_has_its_own_rate(objective):
    for name, rate in setting(objective, STAGE, "lr").items():
        assert rate == (1e-5 if ".backbone." in name else 1e-3), name


def test_backbone_rate_defaults_to_a_tenth(objective):
    found = setting(objective, Stage(lr=1e-3), "lr")
    assert {rate for name, rate in found.items() if ".backbone." in name} == {1e-4}
