"""Compressed gradients of real objectives: known answers, nothing but compression differs, nothing is left behind."""

import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medvit.config import ModelConfig
from medvit.models.classifier import build_classifier
from medvit.models.compression import NONE, Compression, compressed
from medvit.objectives import Objective
from medvit.objectives.selfsupervised import slow_copy
from medvit.records import UsageError
from medvit.training import gradient_measurement
from medvit.training.device import make_fabric
from medvit.training.gradient_measurement import measure_errors, step_seconds
from tests.training.fits import make_objective, same, training, weights

FEW = Compression(0.25)
LARGE = Compression(patch=16)


class Linear(Objective):
    """A linear loss of the features of an embedding without blocks: its gradient is the mean of what tokens say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"depth": 0, "embed_dim": 8, "num_heads": 1, "patch_size": 8}
        config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=options)
        self.classifier = build_classifier(config, size=32, channels=3, classes=2)[0]
        self.classifier.requires_grad_(False)
        self.classifier.backbone.model.cls_token.requires_grad_(True)  # it learns: it is in training mode
        nn.init.normal_(self.classifier.backbone.model.pos_embed)
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        return {"loss": (self.classifier.backbone(batch["input"]) @ self.weight).mean()}


def slices(count: int, seed: int = 0) -> dict[str, Tensor]:
    values = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"input": values, "label": torch.zeros(count, dtype=torch.long)}


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(training())


def test_token_dropout_of_a_linear_model_scatters_as_sampling_theory_says_and_has_no_bias(fabric):
    """All steps see the same two slices, so that only the drawing of tokens varies: 4 of 16 without replacement."""
    objective = Linear()
    whole, few = measure_errors(objective, [[slices(2)]] * 400, [FEW], 0.0, fabric)
    with torch.no_grad():
        tokens = objective.classifier.backbone.eval().tokens(slices(2)["input"])[:, 1:]  # (2, 16, D)
    of_mean = (1 - 4 / 16) / 4 * tokens.var(dim=1)  # (2, D): a mean of 4 of 16
    expected = float((of_mean / 2**2).sum())  # of the mean of two slices
    assert (whole.bias2, whole.variance, whole.cost, whole.cosine) == pytest.approx((0, 0, 1, 1), abs=1e-12)
    assert few.variance == pytest.approx(expected, rel=0.1)
    assert abs(few.bias2) < 4 * expected / 400
    assert few.tokens_share == 0.25


def test_what_drawing_costs_is_part_of_the_price(fabric):
    """Slow batches take as long for fewer tokens: the less there is to save, and beside workers up to a floor."""

    def slowly() -> Any:
        for _ in range(3):
            time.sleep(0.3)  # a step computes some milliseconds
            yield [slices(2)]

    _, few = measure_errors(Linear(), slowly(), [FEW], 0.0, fabric)
    assert few.cost == pytest.approx(1, abs=0.1)
    assert step_seconds(8.0, 2.0, workers=0) == 10
    assert step_seconds(8.0, 2.0, workers=1) == 8
    assert step_seconds(1.0, 6.0, workers=2) == 3


def test_the_bias_of_larger_patches_is_the_difference_of_gradients(fabric):
    objective = Linear()
    _, large = measure_errors(objective, [[slices(2)]] * 3, [LARGE], 0.0, fabric)
    gradients = []
    for one in (NONE, LARGE):
        objective.zero_grad()
        with compressed(objective.classifier.backbone.train(), one):
            objective(slices(2), 0.0)["loss"].backward()
        gradients.append(objective.weight.grad.clone())
    assert large.bias2 == pytest.approx(float((gradients[1] - gradients[0]).square().sum()), rel=1e-4)
    assert large.variance == pytest.approx(0, abs=1e-10)
    assert large.cosine < 0.999


def case_batch(seed: int, count: int = 4) -> dict[str, Tensor]:
    values = torch.randn(count, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {
        "input": values,
        "mask": torch.ones(count, 2, dtype=torch.bool),
        "label": torch.arange(count) % 2,
        "index": torch.arange(count),
    }


def steps(count: int) -> list[list[dict[str, Tensor]]]:
    return [[case_batch(2 * number), case_batch(2 * number + 1)] for number in range(count)]


def test_the_gradient_is_that_of_a_whole_optimizer_step(fabric):
    """Two micro-batches of four cases are one batch of eight: the scatter of a step is what training feels."""
    joined = [[{name: torch.cat([one[name] for one in step]) for name in step[0]}] for step in steps(6)]
    accumulated, whole = (measure_errors(make_objective(), given, [], 0.0, fabric)[0] for given in (steps(6), joined))
    assert accumulated.variance == pytest.approx(whole.variance, rel=1e-4)


def test_the_objective_is_left_as_it_was(fabric):
    objective = make_objective(random=True)
    objective.register_buffer("queue", torch.zeros(1))
    objective.register_forward_hook(lambda module, *_: setattr(module.queue, "data", module.queue + 1))
    before = weights(objective)
    objective.eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure_errors(objective, steps(3), [FEW], 0.5, fabric)
    assert torch.equal(torch.rand(3), expected)
    assert same(weights(objective), before)
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert not any(module.training for module in objective.modules())
    assert objective.classifier.backbone.compression == NONE


def test_what_an_objective_remembers_is_the_same_for_all(fabric):
    """Negatives of a queue: a second gradient of the same batch must not see those of the first."""
    objective, seen = make_objective(), []
    objective.register_buffer("queue", torch.zeros(1))

    def remember(module: Any, _given: Any) -> None:
        seen.append(float(module.queue))
        module.queue.add_(1)

    objective.register_forward_pre_hook(remember)
    measure_errors(objective, [[batch] for step in steps(2) for batch in step], [FEW, Compression(0.5)], 0.5, fabric)
    assert set(seen) == {0.0}


def test_compressions_see_the_same_batches_in_turn(fabric):
    objective, seen = make_objective(), []
    objective.register_forward_pre_hook(
        lambda module, given: seen.append((float(given[0]["input"].sum()), module.classifier.backbone.compression))
    )
    measure_errors(objective, [step[:1] for step in steps(3)], [FEW], 0.5, fabric)
    batches, compressions = zip(*seen, strict=True)
    assert list(compressions) == [NONE, FEW] * 4  # the first round warms up
    sums = [float(case_batch(2 * number)["input"].sum()) for number in (0, 0, 1, 2)]
    assert list(batches) == [one for one in sums for _ in range(2)]


def test_cost_is_measured_time_and_not_the_share_of_tokens(fabric, monkeypatch):
    ticks = itertools.count()  # every step takes one
    monkeypatch.setattr(gradient_measurement.time, "perf_counter", lambda: float(next(ticks)))
    _, few = measure_errors(make_objective(), steps(3), [FEW], 0.5, fabric)
    assert (few.cost, few.tokens_share) == (1.0, 0.25)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_teacher_sees_whole_slices_unless_it_is_to_see_as_little(fabric, symmetric):
    objective, seen = make_objective(), []
    objective.teacher = slow_copy(objective.classifier.backbone)

    def look(module: Any, given: Any) -> None:
        with torch.no_grad():
            seen.append(module.teacher.tokens(given[0]["input"][:, 0]).shape[1] - 1)

    objective.register_forward_pre_hook(look)
    measure_errors(objective, [step[:1] for step in steps(2)], [FEW], 0.5, fabric, symmetric=symmetric)
    assert set(seen) == ({4, 1} if symmetric else {4})  # of 4 patches
    assert not objective.teacher.training


def test_the_slowest_round_does_not_count(fabric, monkeypatch):
    """The median of five: one step that was interrupted, and the first round, which warms up."""
    spans = [0, 99, 99, 4, 2, 0, 4, 2, 0, 50, 70, 0, 4, 2, 0, 4, 2, 0]  # 0: batches are drawn in no time
    ticks = itertools.accumulate(span for pair in spans for span in (0, pair))  # at the beginning and end of each
    monkeypatch.setattr(gradient_measurement.time, "perf_counter", lambda: float(next(ticks)))
    _, few = measure_errors(make_objective(), steps(5), [FEW], 0.5, fabric)
    assert few.cost == 0.5


def test_models_without_tokens_are_refused(fabric):
    with pytest.raises(UsageError, match="has no patch tokens"):
        measure_errors(make_objective(model="resnet18"), steps(2), [FEW], 0.0, fabric)
