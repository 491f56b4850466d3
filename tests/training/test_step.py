"""The gradient of a step, and training that has come apart."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medvit.config import Stage
from medvit.records import MedvitError
from medvit.training.checkpoint import load, under
from medvit.training.loop import Run, fit
from medvit.training.step import seed_for
from tests.training.fits import (
    Weights,
    first_moments,
    make_dataset,
    make_objective,
    rising,
    same,
    scripted,
    training,
    weights,
)

# classes

UNEQUAL = [0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 7), (2, 4), (4, 2)])
def test_accumulated_gradient_is_that_of_the_large_batch_under_class_weights(batch_size, accumulate, tmp_path):
    """Averaging losses that were each divided by their own weights would count the rare class of a batch too little."""
    gradients = []
    for name, settings in (("large", (7, 1)), ("small", (batch_size, accumulate))):
        config = training(batch_size=settings[0], accumulate=settings[1], clip_norm=1e6)
        objective = make_objective(counts=(6, 1), class_weights=True)
        fit(objective, make_dataset(labels=UNEQUAL), config, rising(), Run(folder=tmp_path / name))
        gradients.append(first_moments(tmp_path / name))
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-4)


def test_loss_of_an_epoch_does_not_depend_on_how_batches_are_cut(tmp_path):
    losses = []
    for batch_size, accumulate in ((7, 1), (1, 7), (3, 3)):
        config = training(batch_size=batch_size, accumulate=accumulate)
        objective = make_objective(counts=(6, 1), class_weights=True)
        run = Run(folder=tmp_path / str(batch_size))
        losses.append(fit(objective, make_dataset(labels=UNEQUAL), config, rising(), run).rows[0]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scalars_of_the_objective_are_averaged_over_cases_into_the_metrics(accumulate, tmp_path):
    objective = make_objective()
    # batches of 3 and 2 cases: a mean over batches would be another one
    objective.register_forward_hook(
        lambda _, arguments, result: result | {"highest": arguments[0]["index"].max().float()}
    )
    seen: list[tuple[float, int]] = []
    objective.register_forward_pre_hook(
        lambda _, arguments: seen.append((float(arguments[0]["index"].max()), len(arguments[0]["index"])))
    )
    config = training(batch_size=3, accumulate=accumulate)
    row = fit(objective, make_dataset(5), config, rising(), Run(folder=tmp_path)).rows[0]
    assert row["highest"] == pytest.approx(sum(value * count for value, count in seen) / 5)
    assert "logits" not in row


def test_balanced_sampling_draws_the_rare_class_as_often(tmp_path):
    objective = make_objective(counts=(6, 1))
    drawn: list[int] = []
    objective.register_forward_pre_hook(lambda _, arguments: drawn.extend(arguments[0]["label"].tolist()))
    config = training(stages=(Stage(epochs=2),))
    dataset = make_dataset(labels=UNEQUAL)
    dataset.strata = dataset.labels
    fit(objective, dataset, config, rising(), Run(folder=tmp_path))
    assert 6 <= sum(drawn) <= 8
    assert len(drawn) == 14


# random draws


def test_seeds_of_micro_batches_differ_in_every_place():
    places = [(s, e, n, r) for s in range(3) for e in range(5) for n in range(5) for r in range(2)]
    assert len({seed_for(*place) for place in places}) == len(places)


def test_draws_of_a_batch_depend_on_nothing_that_was_drawn_before(tmp_path):
    ends = []
    for draws in (0, 5):
        objective = make_objective(random=True)
        run = Run(folder=tmp_path / str(draws), on_step=lambda _, draws=draws: torch.rand(draws))
        fit(objective, make_dataset(), training(accumulate=2), rising(), run)
        ends.append(weights(objective))
    assert same(*ends)


# precision


@pytest.fixture
def _low_scale(monkeypatch):
    """Scaled by 128: nothing overflows by itself."""
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=128.0))


@pytest.mark.usefixtures("_low_scale")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains_and_keeps_weights_in_32_bits(precision, tmp_path):
    objective = make_objective()
    dtypes: set[torch.dtype] = set()
    objective.classifier.backbone.model.blocks[0].mlp.fc1.register_forward_hook(
        lambda _, __, output: dtypes.add(output.dtype)
    )
    before = weights(objective)
    history = fit(objective, make_dataset(), training(precision=precision), rising(), Run(folder=tmp_path))
    assert dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    assert math.isfinite(history.rows[0]["loss"])
    assert not same(weights(objective), before)
    assert all(value.dtype == torch.float32 for value in objective.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_normalisers_of_the_loss_are_not_rounded_by_mixed_precision(precision, tmp_path):
    objective = make_objective()
    objective.totals = lambda batch: torch.tensor([1000.0 + len(batch["index"])])
    seen: list[Tensor] = []
    objective.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]["totals"]))
    config = training(precision=precision, batch_size=3)
    fit(objective, make_dataset(3), config, rising(), Run(folder=tmp_path))
    assert seen[0].tolist() == [1003.0]  # in 16 bits: 1000 or 1008


@pytest.mark.usefixtures("_low_scale")
def test_clipping_sees_gradients_without_the_scale_of_fp16(tmp_path):
    config = training(precision="16-mixed", batch_size=6, clip_norm=1e-3)
    fit(make_objective(), make_dataset(6), config, rising(), Run(folder=tmp_path))
    norm = torch.cat([value.flatten() for value in first_moments(tmp_path).values()]).norm()
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # clipped while scaled, it would be 128 times less


def spoil(objective: Any, value: Callable[[Tensor], Tensor], calls: range) -> None:
    """In these calls, counted from 0, the loss goes through `value`."""
    number = [-1]

    def hook(_module: nn.Module, _arguments: Any, result: dict[str, Tensor]) -> dict[str, Tensor]:
        number[0] += 1
        return {"loss": value(result["loss"])} if number[0] in calls else result

    objective.register_forward_hook(hook)


def infinite_gradient(loss: Tensor) -> Tensor:
    return loss + torch.sqrt(loss - loss)


@pytest.mark.usefixtures("_low_scale")
def test_steps_that_fp16_leaves_out_are_counted_and_change_nothing(tmp_path):
    objective = make_objective()
    steps: list[int] = []
    objective.after_step = lambda: steps.append(1)
    spoil(objective, infinite_gradient, range(1, 2))  # the second of three steps
    row = fit(objective, make_dataset(6), training(precision="16-mixed"), rising(), Run(folder=tmp_path)).rows[0]
    assert row["skipped_share"] == pytest.approx(1 / 3)
    assert len(steps) == 2


@pytest.mark.usefixtures("_low_scale")
def test_only_a_long_run_of_steps_that_fp16_leaves_out_stops_training(tmp_path):
    def spoilt(steps: range) -> Any:
        objective = make_objective()
        spoil(objective, infinite_gradient, steps)
        config = training(precision="16-mixed", stages=(Stage(epochs=8),))  # 24 steps
        return fit(objective, make_dataset(6), config, rising(), Run(folder=tmp_path))

    assert len(spoilt(range(1, 20)).rows) == 8
    with pytest.raises(MedvitError, match="gradient became"):
        spoilt(range(1, 21))


@pytest.mark.usefixtures("_low_scale")
def test_scale_of_fp16_is_remembered_by_a_resumed_fit(tmp_path):
    config = training(precision="16-mixed", stages=(Stage(epochs=2),))
    objective = make_objective()
    spoil(objective, infinite_gradient, range(1, 2))

    def stop(_row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(objective, make_dataset(6), config, rising(), Run(folder=tmp_path, on_epoch=stop))
    fit(make_objective(), make_dataset(6), config, rising(), Run(folder=tmp_path, resume=True))
    assert load(tmp_path / "last.safetensors")[1]["scaler"]["scale"] == 64.0


# options of the model


def test_compiling_changes_no_names_and_is_used(tmp_path, monkeypatch):
    compiled: list[nn.Module] = []
    original = nn.Module.compile

    def compile_eagerly(module: nn.Module, *_: Any, **__: Any) -> None:
        compiled.append(module)
        original(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    objective, plain = make_objective(), make_objective()
    fit(objective, make_dataset(4), training(compile=True), rising(), Run(folder=tmp_path / "compiled"))
    fit(plain, make_dataset(4), training(), rising(), Run(folder=tmp_path / "plain"))
    assert compiled == [objective.classifier.backbone]
    assert objective.state_dict().keys() == plain.state_dict().keys()
    first, second = (load(tmp_path / name / "last.safetensors")[0] for name in ("compiled", "plain"))
    assert first.keys() == second.keys()
    for name, value in weights(plain).items():
        torch.testing.assert_close(objective.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_gradient_checkpointing_keeps_less_for_the_same_weights(tmp_path):
    ends, kept = [], []
    for on in (False, True):
        objective = make_objective(random=True)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            config = training(gradient_checkpointing=on, batch_size=6)
            fit(objective, make_dataset(6), config, rising(), Run(folder=tmp_path / str(on)))
        ends.append(weights(objective))
        kept.append(sum(sizes))
    assert kept[1] < kept[0]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-5, rtol=1e-4)


# divergence


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda loss: loss * math.nan, "loss became nan"),
        (lambda loss: loss * math.inf, "loss became inf"),
        (infinite_gradient, "gradient became"),
    ],
    ids=["loss not a number", "loss infinite", "gradient not a number"],
)
def test_training_that_diverged_names_cases_epoch_checkpoint_and_what_to_do(value, what, tmp_path):
    objective, batches = make_objective(), []
    spoil(objective, value, range(4, 5))
    objective.register_forward_pre_hook(lambda _, arguments: batches.append(arguments[0]["index"].tolist()))
    stages = (Stage(name="a", epochs=1), Stage(name="b", epochs=1))
    with pytest.raises(MedvitError) as raised:
        fit(objective, make_dataset(), training(stages=stages), rising(), Run(folder=tmp_path))
    text = str(raised.value)
    assert text.startswith(f"the {what}")
    assert "in epoch 2" in text
    assert all(f"c{index}" in text for index in batches[4])
    assert not any(f"c{index}" in text for index in set(range(6)) - set(batches[4]))
    assert "last good checkpoint is kept" in text
    assert "training.stages.1.lr" in text
    assert raised.value.exit_code != 0


def test_only_the_batch_with_the_infinite_loss_is_named_of_an_accumulation(tmp_path):
    objective, batches = make_objective(), []
    spoil(objective, lambda loss: loss * math.nan, range(1, 2))
    objective.register_forward_pre_hook(lambda _, arguments: batches.append(arguments[0]["index"].tolist()))
    with pytest.raises(MedvitError, match=r"on cases c\d, c\d\.") as raised:
        fit(objective, make_dataset(), training(accumulate=3), rising(), Run(folder=tmp_path))
    assert all(f"c{index}" in str(raised.value) for index in batches[1])


def test_few_of_many_cases_are_named(tmp_path):
    objective = make_objective()
    spoil(objective, lambda loss: loss * math.nan, range(1))
    with pytest.raises(MedvitError, match="and 7 more"):
        fit(objective, make_dataset(12), training(batch_size=12), rising(), Run(folder=tmp_path))


def test_last_good_checkpoint_survives_divergence(tmp_path):
    objective = make_objective()
    spoil(objective, infinite_gradient, range(4, 5))
    seen: list[Weights] = []
    objective.after_step = lambda: seen.append(weights(objective))
    config = training(stages=(Stage(epochs=2),), checkpoint_minutes=0)
    with pytest.raises(MedvitError):
        fit(objective, make_dataset(), config, scripted((0.5, 1)), Run(folder=tmp_path))
    tensors, about = load(tmp_path / "last.safetensors")
    assert (about["position"]["epoch"], about["position"]["steps"]) == (1, 1)
    assert same(under("objective", tensors), seen[3])


@pytest.mark.parametrize("part", [0, 1], ids=["batches", "draws"])
def test_seed_decides_the_batches_and_what_is_drawn_in_them(part, tmp_path):
    seen = []
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        objective, calls = make_objective(), []
        objective.register_forward_pre_hook(
            lambda _, arguments, calls=calls: calls.append((arguments[0]["index"].tolist(), torch.initial_seed()))
        )
        fit(objective, make_dataset(8), training(seed=seed), rising(), Run(folder=tmp_path / name))
        seen.append([call[part] for call in calls])
    assert seen[0] == seen[1] != seen[2]
