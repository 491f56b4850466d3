import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medvit.config import ModelConfig, ObjectiveConfig, Stage
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES, Objective, Task
from medvit.records import UsageError
from medvit.training.optimizer import BACKBONE, course, parameter_groups

SMALL = {"depth": 3, "embed_dim": 16, "num_heads": 2, "patch_size": 16}
MODELS = {
    "vit_tiny_patch16_224": {**SMALL, "depth": 12},
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "swin_tiny_patch4_window7_224": {"embed_dim": 12},
    "resnet10t": {},
}
STAGE = Stage(lr=1e-3, backbone_lr=1e-5, weight_decay=0.3)

# the course of the rate

any_stage = st.builds(
    Stage,
    epochs=st.integers(1, 60),
    warmup=st.floats(0, 0.99),
    min_lr=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "restarts"]),
    restart_epochs=st.integers(1, 20),
    restart_factor=st.integers(1, 4),
)
schedules = st.tuples(any_stage, st.integers(min_value=1, max_value=400))


def rates(stage: Stage, steps: int, beyond: int = 0) -> list[float]:
    factor = course(stage, steps)
    return [factor(step) for step in range(steps + beyond)]


def restarts_at(found: list[float]) -> list[int]:
    """Steps at which the rate rises after it had fallen."""
    peak = found.index(max(found))
    return [step for step, (a, b) in enumerate(pairwise(found), 1) if step > peak and b > a + 1e-12]


@given(schedules)
def test_rate_is_never_zero_at_the_start(schedule):
    stage, steps = schedule
    assert rates(stage, steps)[0] > 0
    assert rates(Stage(warmup=stage.warmup, min_lr=0), steps)[0] > 0


@pytest.mark.parametrize("schedule", ["cosine", "restarts"])
def test_rate_of_the_first_epoch_is_not_zero_throughout_where_warm_up_takes_longer(schedule):
    stage = Stage(epochs=10, warmup=0.5, schedule=schedule, restart_epochs=5)
    first = rates(stage, 10 * 7)[:7]
    assert all(rate > 0 for rate in first)
    assert all(a < b for a, b in pairwise(first))


@given(schedules)
def test_peak_is_reached_and_never_passed(schedule):
    assert max(rates(*schedule)) == pytest.approx(1)


@given(schedules)
def test_cosine_rises_to_the_peak_and_then_only_falls(schedule):
    stage = schedule[0].model_copy(update={"schedule": "cosine"})
    found = rates(stage, schedule[1], beyond=50)
    peak = found.index(max(found))
    assert all(a <= b for a, b in pairwise(found[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(found[peak:]))


@given(schedules)
def test_past_the_end_no_rate_rises_again(schedule):
    stage, steps = schedule
    assert rates(stage, steps, beyond=500)[steps:] == pytest.approx([stage.min_lr] * 500)


@given(schedules)
def test_run_ends_at_the_minimum_and_not_in_the_middle_of_a_cycle(schedule):
    stage, steps = schedule
    after_warm_up = steps - min(round(stage.warmup * steps), steps - 1)
    if after_warm_up > 1:  # one step is spent at the peak
        assert rates(stage, steps)[-1] == pytest.approx(stage.min_lr)


@given(schedules)
def test_restart_begins_at_the_peak_after_an_end_at_the_minimum(schedule):
    stage = schedule[0].model_copy(update={"min_lr": 0.01})
    found = rates(stage, schedule[1])
    starts = restarts_at(found)
    assert [found[step] for step in starts] == pytest.approx([1] * len(starts))
    long = [end for start, end in pairwise([found.index(max(found)), *starts]) if end - start > 1]
    assert [found[end - 1] for end in long] == pytest.approx([0.01] * len(long))


def test_warm_up_is_linear_over_its_share_of_steps():
    assert rates(Stage(warmup=0.1), 100)[:12] == pytest.approx([*(k / 11 for k in range(1, 12)), 1], abs=1e-3)


def test_restarts_are_those_of_torch():
    steps_per_epoch, minimum = 200, 0.01
    stage = Stage(epochs=70, warmup=0, min_lr=minimum, schedule="restarts", restart_epochs=10, restart_factor=2)
    found = rates(stage, 70 * steps_per_epoch)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2, eta_min=minimum)
    for epoch in (0.25, 3, 9.5, 10.01, 20, 29.9, 30.01, 50, 69.5):
        theirs.step(epoch)
        assert found[round(epoch * steps_per_epoch)] == pytest.approx(optimizer.param_groups[0]["lr"], abs=2e-3), epoch


@pytest.mark.parametrize(
    ("epochs", "lengths"),
    [(10, [10]), (15, [15]), (20, [20 / 3, 40 / 3]), (30, [10, 20]), (35, [35 / 3, 70 / 3]), (70, [10, 20, 40])],
)
def test_whole_cycles_are_stretched_to_fill_the_stage(epochs, lengths):
    stage = Stage(epochs=epochs, warmup=0, schedule="restarts", restart_epochs=10, restart_factor=2)
    starts = [0, *restarts_at(rates(stage, epochs * 30)), epochs * 30]
    assert [b - a for a, b in pairwise(starts)] == pytest.approx([30 * length for length in lengths], abs=1)


def test_cycles_of_equal_length():
    stage = Stage(epochs=12, warmup=0, schedule="restarts", restart_epochs=3, restart_factor=1)
    assert restarts_at(rates(stage, 120)) == [30, 60, 90]


def test_cycles_fill_what_the_warm_up_leaves():
    stage = Stage(epochs=12, warmup=0.25, schedule="restarts", restart_epochs=6, restart_factor=1)
    found = rates(stage, 120)
    assert (found.index(1), restarts_at(found)) == (30, [75])


def test_minimum_is_a_share_of_each_groups_own_peak(objective):
    optimizer = torch.optim.AdamW(parameter_groups(objective, STAGE))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, course(Stage(min_lr=0.01), 10))
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    assert {round(group["lr"], 12) for group in optimizer.param_groups} == {1e-5, 1e-7}


# groups


def make(name: str, size: int = 32, learning: ObjectiveConfig | None = None, **settings) -> Objective:
    torch.manual_seed(0)
    options = SMALL if "siglip" in name else MODELS.get(name, {})
    config = ModelConfig(name=name, weights="none", options=options, **settings)
    classifier, _ = build_classifier(config, size=size, channels=3, classes=2)
    learning = learning or ObjectiveConfig()
    return OBJECTIVES[learning.name](classifier, learning, Task((1, 1), domains=2))


@pytest.fixture(scope="module", params=MODELS)
def objective(request):
    return make(request.param)


@pytest.fixture(autouse=True)
def thawed(request):
    yield
    if "objective" in request.fixturenames:  # shared by the tests of this module
        request.getfixturevalue("objective").classifier.set_trainable("all")


def setting(objective, stage: Stage, key: str) -> dict[str, float]:
    """Parameter name -> what its group says."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {names[id(p)]: group[key] for group in parameter_groups(objective, stage) for p in group["params"]}


@pytest.mark.parametrize("layer_rates", ["flat", "decay", "multiplier"])
@pytest.mark.parametrize("trainable", ["head", "top", "all"])
def test_each_trainable_parameter_is_in_exactly_one_group_and_no_other_is(trainable, layer_rates, objective):
    objective.classifier.set_trainable(trainable, 1)
    stage = STAGE.model_copy(update={"layer_rates": layer_rates})
    members = [id(p) for group in parameter_groups(objective, stage) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in objective.parameters() if p.requires_grad)


def test_frozen_parameters_are_in_no_group(objective):
    objective.classifier.set_trainable("head")
    names = set(setting(objective, STAGE, "lr"))
    assert names == {name for name, _ in objective.named_parameters() if ".backbone." not in name}


def test_only_kernels_and_matrices_are_decayed_no_norm_bias_token_or_position(objective):
    kernels = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    ids = {name: id(parameter) for name, parameter in objective.named_parameters()}
    decays = setting(objective, STAGE, "weight_decay")
    assert decays == {name: 0.3 if ids[name] in kernels else 0 for name in ids}
    spared = ("bias", "norm", "pos_embed", "_token", "gamma", "relative_position_bias_table")
    assert all(decay == 0 for name, decay in decays.items() if any(part in name for part in spared))


def test_token_that_timm_forgets_is_not_decayed_either():
    objective = make("vit_base_patch16_siglip_224", features="pooled")
    decays = setting(objective, STAGE, "weight_decay")
    latent = BACKBONE + "model.attn_pool.latent"
    assert "attn_pool.latent" not in objective.classifier.backbone.no_weight_decay()
    assert decays[latent] == 0


def test_backbone_has_its_own_rate(objective):
    for name, rate in setting(objective, STAGE, "lr").items():
        assert rate == (1e-5 if ".backbone." in name else 1e-3), name


def test_backbone_rate_defaults_to_a_tenth(objective):
    found = setting(objective, Stage(lr=1e-3), "lr")
    assert {rate for name, rate in found.items() if ".backbone." in name} == {1e-4}


def block_of(name: str) -> int | None:
    found = re.search(r"\.blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def test_decay_goes_by_block_index_where_blocks_1_is_also_in_blocks_10_and_11():
    stage = STAGE.model_copy(update={"layer_rates": "decay", "layer_decay": 0.5})
    for name, rate in setting(make("vit_tiny_patch16_224"), stage, "lr").items():
        if ".backbone." in name:
            block = block_of(name)
            below = 11 - block if block is not None else 0 if ".model.norm." in name else 12
            assert rate == pytest.approx(1e-5 * 0.5**below), name
        else:
            assert rate == 1e-3, name


def test_multiplier_goes_by_block_index_where_blocks_1_is_also_in_blocks_10_and_11():
    stage = STAGE.model_copy(update={"layer_rates": "multiplier"})
    for name, rate in setting(make("vit_tiny_patch16_224"), stage, "lr").items():
        if ".backbone." in name:
            block = block_of(name)
            share = 0.5 if block in (0, 1) else 0.1 if block is None and ".model.norm." not in name else 1
            assert rate == pytest.approx(1e-5 * share), name


@pytest.mark.parametrize("layer_rates", ["decay", "multiplier"])
def test_rates_never_fall_with_depth(layer_rates, objective):
    stage = STAGE.model_copy(update={"layer_rates": layer_rates})
    found = [rate for name, rate in setting(objective, stage, "lr").items() if ".backbone." in name]
    model = objective.classifier.backbone.model
    first = next(iter(getattr(model, "patch_embed", model).parameters()))
    deepest = [p for name, p in model.named_parameters() if re.match(r"blocks\.\d+|layers\.3|layer4", name)][-1]
    rate = {id(p): group["lr"] for group in parameter_groups(objective, stage) for p in group["params"]}
    assert rate[id(first)] == min(found) < max(found) == rate[id(deepest)] == 1e-5


def test_last_group_called_backbone_is_the_top_blocks(objective):
    stage = STAGE.model_copy(update={"layer_rates": "decay"})
    groups = [group for group in parameter_groups(objective, stage) if group["name"] == "backbone"]
    assert parameter_groups(objective, stage)[-1]["name"] == "backbone"
    assert groups[-1]["lr"] == 1e-5
    assert [group["lr"] for group in groups] == sorted(group["lr"] for group in groups)


def test_top_stage_has_no_group_of_what_is_frozen_and_its_top_at_the_full_rate():
    objective = make("vit_tiny_patch16_224")
    objective.classifier.set_trainable("top", 3)
    stage = STAGE.model_copy(update={"layer_rates": "decay", "layer_decay": 0.5})
    found = {rate for name, rate in setting(objective, stage, "lr").items() if ".backbone." in name}
    assert sorted(found) == pytest.approx([2.5e-6, 5e-6, 1e-5])


def test_groups_made_after_a_change_of_size_hold_the_new_position_embedding():
    objective = make("vit_tiny_patch16_224", size=64)
    old = objective.classifier.backbone.model.pos_embed
    objective.classifier.set_size(32)
    members = {id(p) for group in parameter_groups(objective, STAGE) for p in group["params"]}
    assert id(objective.classifier.backbone.model.pos_embed) in members
    assert id(old) not in members


def test_head_of_the_backbone_itself_learns_like_the_backbone():
    rates = setting(make("convnext_atto"), STAGE, "lr")
    assert rates[BACKBONE + "model.head.norm.weight"] == 1e-5


def test_other_modules_of_an_objective_learn_like_the_head():
    objective = make("vit_tiny_patch16_224")
    objective.discriminator = nn.Linear(4, 2)
    found = {id(p): group for group in parameter_groups(objective, STAGE) for p in group["params"]}
    for parameter in objective.discriminator.parameters():
        assert (found[id(parameter)]["name"], found[id(parameter)]["lr"]) == ("head", 1e-3)


@pytest.mark.parametrize("name", ["dann", "cdan"])
def test_domain_head_learns_at_a_rate_of_its_own_and_nothing_else_does(name):
    objective = make("vit_tiny_patch16_224", learning=ObjectiveConfig(name=name, discriminator_rate=30))
    objective.classifier.set_trainable("top", 1)
    for parameter, rate in setting(objective, STAGE, "lr").items():
        expected = 3e-2 if ".discriminator." in parameter else 1e-5 if ".backbone." in parameter else 1e-3
        assert rate == pytest.approx(expected), parameter


def test_layer_rates_of_a_model_whose_blocks_nobody_tells_apart_are_refused():
    objective = make("poolformer_s12")
    assert math.isclose(max(setting(objective, STAGE, "lr").values()), 1e-3)
    with pytest.raises(UsageError, match="layer_rates flat"):
        parameter_groups(objective, STAGE.model_copy(update={"layer_rates": "decay"}))
