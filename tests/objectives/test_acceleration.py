"""Any objective with fewer tokens early: the contract is kept, evaluation is whole, and schedules only relax."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medvit.config import (
    PRETRAINING,
    AccelerationConfig,
    AccelerationStep,
    Config,
    ModelConfig,
    ObjectiveConfig,
    Stage,
)
from medvit.models.backbone import Backbone
from medvit.models.classifier import build_classifier
from medvit.models.compression import NONE, Compression
from medvit.objectives import OBJECTIVES, Objective, Task, build_objective
from medvit.objectives.acceleration import Accelerated, check_relaxing, compression_at
from medvit.records import EXIT_USAGE, UsageError
from medvit.training.optimizer import parameter_groups

OPTIONS = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
RELAXING = [
    {"from_progress": 0.0, "keep": 0.5, "patch": 16},
    {"from_progress": 0.3, "keep": 0.5},
    {"from_progress": 0.8},
]
ONE_SIZE = [{"from_progress": 0.0, "keep": 0.5}, {"from_progress": 0.8}]
UNCOMPRESSED = [{"from_progress": 0.0}, {"from_progress": 0.5}]


def make(
    name: str = "supervised", schedule: Any = None, *, model: str = "vit_tiny_patch16_224", tuning: Any = "full"
) -> Any:
    """The same weights every time."""
    torch.manual_seed(0)
    options = OPTIONS if model.startswith("vit") else {}
    config = ModelConfig(name=model, weights="none", options=options, tuning=tuning)
    classifier, _ = build_classifier(config, size=32, channels=3, classes=2)
    acceleration = None if schedule is None else {"schedule": schedule}
    objective = build_objective(classifier, ObjectiveConfig(name=name, acceleration=acceleration), Task((3, 3), 2))
    for module in objective.modules():  # of the discriminator
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return objective.train()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    values = torch.randn(6, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {
        "input": values,
        "mask": torch.ones(6, 2, dtype=torch.bool),
        "label": torch.tensor([0, 1, 0, 1, -1, -1]),
        "domain": torch.tensor([0, 0, 0, 0, 1, 1]),
        "index": torch.arange(6),
    }


def run(objective: Objective, batch: dict[str, Tensor], progress: float = 0.1) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return objective({**batch, "totals": objective.totals(batch)}, progress)


def seen_tokens(backbone: Backbone) -> list[int]:
    """How many tokens its blocks are given, each time."""
    seen: list[int] = []
    backbone.model.norm.register_forward_hook(lambda _module, given, _result: seen.append(given[0].shape[1]))
    return seen


def fed(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as an objective wants it: two views of each slice where it learns without labels."""
    if name not in PRETRAINING:
        return batch
    return {**batch, "input": batch["input"][:, :, None].repeat(1, 1, 2, 1, 1, 1), "patient": batch["index"]}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_uncompressed_it_is_the_bare_objective_to_the_bit(name, batch):
    batch = fed(name, batch)
    bare, accelerated = make(name), make(name, UNCOMPRESSED)
    results = [run(objective, batch) for objective in (bare, accelerated)]
    assert results[1].pop("tokens_share") == 1
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    for result in results:
        result["loss"].backward()
    pairs = zip(bare.parameters(), accelerated.parameters(), strict=True)
    assert all(torch.equal(own.grad, other.grad) for own, other in pairs if own.grad is not None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_from_fewer_tokens(name, batch):
    masked = name == "mae"  # which hides three quarters itself, and has patches of one size
    objective = make(name, ONE_SIZE if masked else RELAXING)
    seen = seen_tokens(objective.classifier.backbone)
    first = 8 / 16 if masked else 2 / 16
    for progress, share in ((0.0, first), (0.29, first), (0.3, 8 / 16), (0.8, 1.0), (0.99, 1.0)):
        result = run(objective, fed(name, batch), progress)
        assert result["tokens_share"].item() == pytest.approx(share)
        assert seen.pop() == 1 + round((4 if masked else 16) * share)
        result["loss"].backward()
        assert objective.classifier.backbone.compression == NONE
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", PRETRAINING)
def test_what_beside_the_classifier_has_a_size_follows_it(name):
    objective = make(name, ONE_SIZE)
    objective.set_size(48)
    assert {module.size for module in objective.modules() if isinstance(module, Backbone)} == {48}
    assert objective.encoder() is objective.objective.encoder()


def test_low_rank_changes_learn_from_fewer_tokens_too(batch):
    pytest.importorskip("peft", reason="the extra lora")
    objective = make(schedule=RELAXING, tuning="lora")
    objective.classifier.set_trainable("all")
    seen = seen_tokens(objective.classifier.backbone.train())
    run(objective, batch, 0.0)["loss"].backward()
    assert seen == [3]
    learning = [p for p in objective.classifier.backbone.parameters() if p.requires_grad]
    assert learning
    assert all(parameter.grad is not None for parameter in learning)


def test_nothing_is_compressed_but_training(batch):
    objective = make(schedule=RELAXING)
    seen = seen_tokens(objective.classifier.backbone)
    objective.classifier(batch["input"], batch["mask"])  # between steps, even in training mode
    objective.eval()
    objective.classifier(batch["input"], batch["mask"])
    run(objective, batch, 0.0)
    assert seen == [17, 17, 17]


def test_a_stage_with_a_frozen_backbone_sees_whole_slices(batch):
    objective = make(schedule=RELAXING)
    objective.classifier.set_trainable("head")
    objective.train()
    seen = seen_tokens(objective.classifier.backbone)
    assert run(objective, batch, 0.0)["tokens_share"] == 1
    assert seen == [17]


def test_compression_does_not_outlive_an_error(batch):
    objective = make(schedule=RELAXING)
    with pytest.raises(KeyError):
        objective({"input": batch["input"]}, 0.0)
    assert objective.classifier.backbone.compression == NONE


@pytest.mark.parametrize("name", ["supervised", "dann"])
@pytest.mark.parametrize("rates", ["flat", "decay"])
def test_every_parameter_is_in_the_group_it_would_be_in_without(name, rates):
    stage = Stage(layer_rates=rates)
    bare, accelerated = make(name), make(name, RELAXING)
    groups, found = (parameter_groups(objective, stage) for objective in (bare, accelerated))
    settings = [[{k: v for k, v in group.items() if k != "params"} for group in all_] for all_ in (groups, found)]
    assert settings[0] == settings[1]
    assert [[p.shape for p in group["params"]] for group in groups] == [
        [p.shape for p in group["params"]] for group in found
    ]
    names = {name.removeprefix("objective.") for name in accelerated.state_dict()}
    assert names == bare.state_dict().keys()
    assert len(accelerated.state_dict()) == len(names)  # nothing is saved twice


def test_what_follows_a_step_is_passed_on():
    class Counting(Objective):
        steps = 0

        def __init__(self, classifier: Any) -> None:
            super().__init__()
            self.classifier = classifier

        def after_step(self) -> None:
            self.steps += 1

    inner = Counting(make().classifier)
    Accelerated(inner, AccelerationConfig(schedule=RELAXING)).after_step()
    assert inner.steps == 1


class WithTeacher(Objective):
    """As momentum methods are: a second backbone, which never learns, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = make().classifier
        self.teacher = make().classifier.backbone.requires_grad_(False)

    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        slices = batch["input"].flatten(0, 1)
        return {"loss": (self.classifier.backbone(slices) - self.teacher(slices)).square().mean()}


@pytest.mark.parametrize(("symmetric", "tokens"), [(False, 17), (True, 3)])
def test_a_teacher_sees_whole_slices_unless_the_config_says_otherwise(symmetric, tokens, batch):
    inner = WithTeacher()
    objective = Accelerated(inner, AccelerationConfig(schedule=RELAXING, symmetric=symmetric)).train()
    student, teacher = seen_tokens(inner.classifier.backbone), seen_tokens(inner.teacher)
    assert not inner.teacher.training
    run(objective, batch, 0.0)
    assert (student, teacher) == ([3], [tokens])
    assert (inner.teacher.compression, inner.teacher.training) == (NONE, False)
    objective.eval()
    run(objective, batch, 0.0)
    assert (student, teacher) == ([3, 17], [tokens, 17])


def test_two_views_lose_different_tokens(batch):
    objective = make(schedule=RELAXING)
    twice = {**batch, "input": batch["input"][:1].repeat(6, 1, 1, 1, 1)}
    features = []
    backbone = objective.classifier.backbone
    backbone.register_forward_hook(lambda _module, _given, result: features.append(result))
    run(objective, twice, 0.5)
    objective({**twice, "totals": objective.totals(twice)}, 0.5)
    rows = torch.cat(features)[::2]  # the first slice, twelve times
    distances = torch.cdist(rows, rows) + torch.eye(len(rows))
    assert (distances > 1e-6).sum() > 0.9 * distances.numel()


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (-0.1, Compression(0.5, 16)),
        (0.0, Compression(0.5, 16)),
        (0.3, Compression(0.5)),
        (0.79, Compression(0.5)),
        (0.8, NONE),
        (1.0, NONE),
    ],
)
def test_a_step_holds_until_the_next_begins(progress, expected):
    assert compression_at(AccelerationConfig(schedule=RELAXING).schedule, progress) == expected


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([{"from_progress": 0.1, "keep": 0.5}, {"from_progress": 0.5}], "the first begins at 0"),
        ([{"from_progress": 0, "keep": 0.5}, {"from_progress": 0}], "each other one later"),
        ([{"from_progress": 0, "keep": 0.5}, {"from_progress": 0.95}], "begin at 0.9"),
        ([{"from_progress": 0, "keep": 0.5}, {"from_progress": 0.5, "keep": 0.9}], "must be uncompressed"),
        ([{"from_progress": 0, "keep": 0.5}, {"from_progress": 0.5, "patch": 16}], "must be uncompressed"),
        ([], "at least 1"),
        ([{"from_progress": 0, "keep": 0}, {"from_progress": 0.5}], "greater than 0"),
    ],
)
def test_schedules_begin_at_once_and_end_uncompressed(schedule, words):
    with pytest.raises(ValueError, match=words):
        AccelerationConfig(schedule=schedule)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"keep": 0.5}, {"keep": 0.4}),
        ({}, {"keep": 0.9}),
        ({"keep": 0.5}, {"patch": 32}),
        ({"patch": 16}, {"keep": 0.2}),
    ],
)
def test_never_fewer_tokens_than_before(first, second):
    steps = [AccelerationStep(from_progress=at, **step) for at, step in ((0, first), (0.4, second), (0.8, {}))]
    with pytest.raises(UsageError, match=r"from progress 0\.4 on.*never fewer tokens") as caught:
        check_relaxing(steps, own=8)
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(UsageError, match="never fewer"):
        make(schedule=steps)


def test_as_many_tokens_by_other_means_are_no_step_back():
    steps = [{"from_progress": 0, "keep": 0.25}, {"from_progress": 0.4, "patch": 16}, {"from_progress": 0.8}]
    check_relaxing(AccelerationConfig(schedule=steps).schedule, own=8)


@pytest.mark.parametrize("model", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_models_without_tokens_are_refused_at_once(model):
    with pytest.raises(UsageError, match="has no patch tokens"):
        make(schedule=RELAXING, model=model)


def test_patches_of_other_sizes_are_refused_where_pixels_are_told_patch_by_patch():
    with pytest.raises(UsageError, match="Mae tells pixels of patches of one size"):
        make("mae", schedule=[{"from_progress": 0.0, "patch": 16}, {"from_progress": 0.5}])


def test_a_patch_that_does_not_divide_a_later_size_is_refused_there(batch):
    objective = make(schedule=RELAXING)
    objective.classifier.set_size(40)
    larger = nn.functional.interpolate(batch["input"].flatten(0, 1), size=(40, 40)).unflatten(0, (6, 2))
    with pytest.raises(UsageError, match="do not divide slices of 40 px"):
        run(objective, {**batch, "input": larger}, 0.95)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training": {"stages": [{"trainable": "head"}]}}, "it is frozen"),
        ({"model": {"tuning": "linear"}}, "it is frozen"),
        ({"model": {"tuning": "synqt"}}, "it is frozen"),
        ({"training": {"patience": 3}}, "must be 0"),
        ({"preprocessing": {"size": 40}}, "do not divide slices or crops of 40 px"),
        ({"training": {"stages": [{"size": 24}, {}]}}, "do not divide slices or crops of 24 px"),
        (  # the backbone would never learn from whole slices
            {"training": {"stages": [{"epochs": 8}, {"epochs": 2, "trainable": "head"}]}},
            "learns until 0.8 .* begin at 0.72 or before",
        ),
    ],
)
def test_the_config_refuses_what_could_not_work(settings, words):
    tree = {"preprocessing": {"size": 32}, "objective": {"acceleration": {"schedule": RELAXING}}, **settings}
    with pytest.raises(ValueError, match=words):
        Config.model_validate(tree)
