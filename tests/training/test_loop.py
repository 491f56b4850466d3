import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from medvit.config import Stage, TrainingConfig
from medvit.data.dataset import collate, epoch_order
from medvit.records import Case, MedvitError
from medvit.training import loop
from medvit.training.checkpoint import load
from medvit.training.loop import Run, fit, parameter_groups, warmup_cosine
from medvit.training.waiting import WaitingClock

BACKBONE = "classifier.backbone."
HEAD_THEN_ALL = (Stage(name="head", trainable="head", epochs=2, lr=1e-2), Stage(name="all", epochs=2, lr=1e-2))

Weights = dict[str, Tensor]


def training(**settings: Any) -> TrainingConfig:
    return TrainingConfig(
        **{"stages": (Stage(epochs=1, lr=1e-2),), "batch_size": 2, "device": "cpu", "threads": 1, **settings}
    )


def scripted(*rows: tuple[float, float]) -> Callable[[], dict[str, float]]:
    """Validation that says (auroc, loss) of each epoch in turn."""
    script: Iterator[tuple[float, float]] = iter(rows)

    def validate() -> dict[str, float]:
        auroc, loss = next(script)
        return {"auroc": auroc, "loss": loss}

    return validate


def rising() -> Callable[[], dict[str, float]]:
    """The last epoch is always best."""
    return scripted(*((0.1 + k / 100, 1.0) for k in range(50)))


def weights(module: nn.Module) -> Weights:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def first_moments(folder: Path) -> Weights:
    """What AdamW has averaged of the gradients; after one step a tenth of the gradient itself."""
    tensors, _ = load(folder / "last.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith("exp_avg")}


class Interrupted(Exception):  # noqa: N818  no error
    pass


def interrupt_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Interrupted

    return stop


# gradients


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 6), (2, 3), (3, 2)])
def test_accumulated_gradient_is_that_of_the_large_batch(
    batch_size, accumulate, make_objective, make_dataset, tmp_path
):
    for name, settings in (("large", (6, 1)), ("small", (batch_size, accumulate))):
        config = training(batch_size=settings[0], accumulate=settings[1], clip_norm=1e6)
        fit(make_objective(), make_dataset(6), config, rising(), Run(folder=tmp_path / name))
    large, small = first_moments(tmp_path / "large"), first_moments(tmp_path / "small")
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, atol=1e-6, rtol=1e-4)


def reference_loop(objective, dataset, config: TrainingConfig) -> tuple[Weights, list[Tensor]]:
    """One stage by plain torch: groups of batches, each averaged over what it has, clipped once, one step."""
    (stage,) = config.stages
    optimizer = torch.optim.AdamW(parameter_groups(objective, stage))
    steps = math.ceil(math.ceil(len(dataset) / config.batch_size) / config.accumulate)
    factor = warmup_cosine(stage, steps * stage.epochs)
    peaks = [group["lr"] for group in optimizer.param_groups]
    taken = 0
    for epoch in range(stage.epochs):
        dataset.epoch = epoch
        order = epoch_order(len(dataset), config.seed, epoch)
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        for start in range(0, len(batches), config.accumulate):
            group = batches[start : start + config.accumulate]
            optimizer.zero_grad()
            for batch in group:
                (objective(collate([dataset[i] for i in batch]), 0.0)["loss"] / len(group)).backward()
            nn.utils.clip_grad_norm_(objective.parameters(), config.clip_norm)
            for settings, peak in zip(optimizer.param_groups, peaks, strict=True):
                settings["lr"] = peak * factor(taken)
            optimizer.step()
            taken += 1
    return weights(objective), [optimizer.state[p]["exp_avg"] for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("clip_norm", [1e6, 0.05])  # clipped gradients would hide a wrong divisor
def test_last_partial_accumulation_is_kept_and_averaged_over_what_it_has(
    clip_norm, make_objective, make_dataset, tmp_path
):
    config = training(
        batch_size=1, accumulate=4, clip_norm=clip_norm, stages=(Stage(epochs=2, lr=1e-3),)
    )  # 4 + 2 batches
    expected, moments = reference_loop(make_objective(), make_dataset(6), config)
    objective = make_objective()
    fit(objective, make_dataset(6), config, rising(), Run(folder=tmp_path))
    found = first_moments(tmp_path)
    for index, value in enumerate(moments):
        torch.testing.assert_close(found[f"optimizer.{index}.exp_avg"], value, atol=1e-6, rtol=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(objective.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_clipping_acts_on_the_accumulated_gradient(make_objective, make_dataset, tmp_path):
    config = training(batch_size=1, accumulate=6, clip_norm=1e-3)
    fit(make_objective(), make_dataset(6), config, rising(), Run(folder=tmp_path))
    norm = torch.cat([value.flatten() for value in first_moments(tmp_path).values()]).norm()
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # of six clipped ones the average would be shorter


# what is trained


def test_frozen_backbone_is_bit_equal_after_a_fit(make_objective, make_dataset, tmp_path):
    objective = make_objective(random=True)
    before = weights(objective)
    config = training(stages=(Stage(trainable="head", epochs=2, lr=1e-2),))
    fit(objective, make_dataset(), config, rising(), Run(folder=tmp_path))
    changed = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(BACKBONE) for name in changed)


def test_backbone_rests_in_the_head_stage_and_moves_in_the_next(make_objective, make_dataset, tmp_path):
    objective = make_objective()
    seen = [weights(objective.classifier.backbone)]
    run = Run(folder=tmp_path, on_epoch=lambda _: seen.append(weights(objective.classifier.backbone)))
    fit(objective, make_dataset(), training(stages=HEAD_THEN_ALL), rising(), run)
    assert [not same(a, b) for a, b in pairwise(seen)] == [False, False, True, True]


def test_last_batch_of_one_trains(make_objective, make_dataset, tmp_path):
    history = fit(make_objective(), make_dataset(5), training(), rising(), Run(folder=tmp_path))
    assert math.isfinite(history.rows[0]["loss"])


def test_training_lowers_the_loss(make_objective, make_dataset, tmp_path):
    config = training(stages=(Stage(epochs=8, lr=1e-2),))
    rows = fit(make_objective(), make_dataset(), config, rising(), Run(folder=tmp_path)).rows
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_objective_is_left_in_evaluation_mode(make_objective, make_dataset, tmp_path):
    objective = make_objective()
    fit(objective, make_dataset(), training(), rising(), Run(folder=tmp_path))
    assert not any(module.training for module in objective.modules())


def test_objective_is_told_of_each_step_and_of_progress(make_objective, make_dataset, tmp_path):
    objective = make_objective()
    calls: list[str | float] = []
    objective.after_step = lambda: calls.append("step")
    objective.register_forward_pre_hook(lambda _, arguments: calls.append(round(arguments[1], 3)))
    config = training(accumulate=2, stages=(Stage(epochs=2),))  # 3 batches: 2 + 1
    fit(objective, make_dataset(), config, rising(), Run(folder=tmp_path))
    assert calls == [0, 0.167, "step", 0.333, "step", 0.5, 0.667, "step", 0.833, "step"]


# which epoch is kept


def fit_watching(objective, dataset, config, validate, folder) -> tuple[list[Weights], Any]:
    seen: list[Weights] = []
    history = fit(
        objective, dataset, config, validate, Run(folder=folder, on_epoch=lambda _: seen.append(weights(objective)))
    )
    return seen, history


@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([(0.6, 0.5), (0.9, 0.6), (0.7, 0.1)], 2),
        ([(0.8, 0.5), (0.8, 0.4), (0.8, 0.45)], 2),
        ([(0.8, 0.4), (0.8, 0.4), (0.8, 0.4)], 1),
        ([(math.nan, 0.4), (math.nan, 0.3), (math.nan, 0.5)], 2),
        ([(math.nan, 0.1), (0.2, 0.9), (math.nan, 0.1)], 2),
    ],
    ids=["auroc", "tie by loss", "full tie: the first", "no auroc: by loss", "any auroc beats none"],
)
def test_best_epoch_is_reloaded(script, best, make_objective, make_dataset, tmp_path):
    objective = make_objective()
    config = training(stages=(Stage(epochs=3, lr=1e-2),))
    seen, history = fit_watching(objective, make_dataset(), config, scripted(*script), tmp_path)
    assert history.best_epoch == best
    assert same(weights(objective), seen[best - 1])
    assert not same(seen[0], seen[1])


def test_best_epoch_is_reloaded_where_only_the_head_was_trained(make_objective, make_dataset, tmp_path):
    objective = make_objective()
    config = training(stages=(Stage(epochs=3, lr=1e-2, trainable="head"),))
    script = scripted((0.6, 1), (0.9, 1), (0.7, 1))
    seen, _ = fit_watching(objective, make_dataset(), config, script, tmp_path)
    assert same(weights(objective), seen[1])


def test_last_epoch_is_kept_where_asked(make_objective, make_dataset, tmp_path):
    objective = make_objective()
    config = training(select="last", stages=(Stage(epochs=3, lr=1e-2),))
    script = scripted((0.6, 1), (0.9, 1), (0.7, 1))
    seen, history = fit_watching(objective, make_dataset(), config, script, tmp_path)
    assert history.best_epoch == 3
    assert same(weights(objective), seen[2])


def test_refit_stops_after_the_given_epochs_without_validation(make_objective, make_dataset, tmp_path):
    def never() -> dict[str, float]:
        raise AssertionError("validated")

    objective = make_objective()
    history = fit(objective, make_dataset(), training(stages=HEAD_THEN_ALL), never, Run(folder=tmp_path, stop_after=3))
    assert [row["stage"] for row in history.rows] == ["head", "head", "all"]
    assert math.isfinite(history.rows[-1]["loss"])


def test_refit_takes_the_steps_of_the_full_training(make_objective, make_dataset, tmp_path):
    whole, refit = make_objective(), make_objective()
    config = training(stages=(Stage(epochs=3, lr=1e-2),))
    seen, _ = fit_watching(whole, make_dataset(), config, rising(), tmp_path / "whole")
    fit(refit, make_dataset(), config, dict, Run(folder=tmp_path / "refit", stop_after=2))
    assert same(weights(refit), seen[1])


def test_metrics_are_one_json_row_per_epoch(make_objective, make_dataset, tmp_path):
    config = training(stages=HEAD_THEN_ALL)
    history = fit(make_objective(), make_dataset(), config, rising(), Run(folder=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == history.rows
    assert all(0 <= row["waiting_share"] <= 1 for row in rows)
    assert [(row["epoch"], row["stage"]) for row in rows] == [(1, "head"), (2, "head"), (3, "all"), (4, "all")]
    assert {"loss", "lr", "val_auroc", "val_loss"} <= set(rows[0])


def test_rates_of_head_and_backbone_are_in_the_metrics(make_objective, make_dataset, tmp_path):
    stages = (
        Stage(name="head", trainable="head", epochs=1, lr=1e-2, min_lr=1),
        Stage(name="all", epochs=1, lr=1e-3, backbone_lr=1e-5, min_lr=1),
    )
    head, everything = fit(
        make_objective(), make_dataset(), training(stages=stages), rising(), Run(folder=tmp_path)
    ).rows
    assert head["lr"] == pytest.approx(1e-2)
    assert "lr_backbone" not in head
    assert (everything["lr"], everything["lr_backbone"]) == pytest.approx((1e-3, 1e-5))


def test_metrics_are_strict_json_where_a_figure_is_undefined(make_objective, make_dataset, tmp_path):
    fit(make_objective(), make_dataset(), training(), scripted((math.nan, 0.5)), Run(folder=tmp_path))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["val_auroc"], row["val_loss"]) == (None, 0.5)


@pytest.mark.parametrize(("seconds", "share"), [(4.0, 0.8), (0.1, 0.1 / 1.1)])  # per batch; a step takes one
def test_share_of_waiting_is_logged_and_told_where_it_is_large(
    seconds, share, make_objective, make_dataset, tmp_path, monkeypatch, caplog
):
    time = [0.0]
    dataset, objective = make_dataset(6), make_objective()
    load = dataset.load

    def slow_load(case: Case) -> Any:
        time[0] += seconds / 2  # of the two cases of a batch
        return load(case)

    def step(*_: Any) -> None:
        time[0] += 1.0

    dataset.load = slow_load
    objective.register_forward_pre_hook(step)
    monkeypatch.setattr(loop, "WaitingClock", lambda: WaitingClock(lambda: time[0]))
    history = fit(objective, dataset, training(), rising(), Run(folder=tmp_path))
    assert history.rows[0]["waiting_share"] == pytest.approx(share)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("waiting_share")[0].value == pytest.approx(share)
    assert ("80% of the training time (12 s) went by waiting" in caplog.text) == (share > 0.2)
    assert ("data.workers, now 0" in caplog.text) == (share > 0.2)


def test_board_has_the_metrics(make_objective, make_dataset, tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    assert list((tmp_path / "tensorboard").glob("events.*"))


# what can go wrong


def break_loss(objective, epoch: int, value: Callable[[Tensor], Tensor]) -> None:
    """From the given epoch (from 1) of two, the loss goes through `value`."""

    def hook(_module: nn.Module, arguments: tuple[Any, float], result: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": value(result["loss"])} if arguments[1] * 2 >= epoch - 1 else result

    objective.register_forward_hook(hook)


@pytest.mark.parametrize(
    "value",
    [lambda loss: loss * math.nan, lambda loss: loss * math.inf, lambda loss: loss + torch.sqrt(loss - loss)],
    ids=["loss not a number", "loss infinite", "gradient not a number"],
)
def test_training_that_diverged_stops_and_says_what_to_do(value, make_objective, make_dataset, tmp_path):
    objective = make_objective()
    break_loss(objective, 2, value)
    with pytest.raises(MedvitError, match=r"epoch 2.*Lower the learning rate \(training.stages.0.lr\)"):
        fit(objective, make_dataset(), training(stages=(Stage(epochs=2),)), rising(), Run(folder=tmp_path))


def test_weights_of_the_last_whole_epoch_survive_divergence(make_objective, make_dataset, tmp_path):
    objective = make_objective()
    break_loss(objective, 2, lambda loss: loss + torch.sqrt(loss - loss))
    seen: list[Weights] = []
    run = Run(folder=tmp_path, on_epoch=lambda _: seen.append(weights(objective)))
    with pytest.raises(MedvitError):
        fit(objective, make_dataset(), training(stages=(Stage(epochs=2),)), rising(), run)
    tensors, about = load(tmp_path / "last.safetensors")
    assert about["rows"][-1]["epoch"] == 1
    assert same({k[len("objective.") :]: v for k, v in tensors.items() if k.startswith("objective.")}, seen[0])


# resume


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
@pytest.mark.parametrize("select", ["best", "last"])
def test_interrupted_fit_goes_on_bit_for_bit(epoch, select, make_objective, make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WaitingClock", lambda: WaitingClock(lambda: 0.0))  # time is no part of the result
    config = training(stages=HEAD_THEN_ALL, select=select)  # epoch 2 ends a stage
    script = [(0.5, 1.0), (0.6, 1.0), (0.9, 1.0), (0.7, 1.0)]
    whole = make_objective(random=True)
    expected = fit(whole, make_dataset(), config, scripted(*script), Run(folder=tmp_path / "whole"))

    stop = Run(folder=tmp_path / "cut", on_epoch=interrupt_after(epoch))
    with pytest.raises(Interrupted):
        fit(make_objective(random=True), make_dataset(), config, scripted(*script), stop)
    resumed = make_objective(random=True)
    go_on = Run(folder=tmp_path / "cut", resume=True)
    history = fit(resumed, make_dataset(), config, scripted(*script[epoch:]), go_on)
    assert same(weights(resumed), weights(whole))
    assert history == expected


def test_finished_fit_is_not_trained_again(make_objective, make_dataset, tmp_path):
    first, second = make_objective(), make_objective()
    config = training(stages=(Stage(epochs=2, lr=1e-2),))
    fit(first, make_dataset(), config, scripted((0.9, 1), (0.5, 1)), Run(folder=tmp_path))
    fit(second, make_dataset(), config, scripted(), Run(folder=tmp_path, resume=True))
    assert same(weights(first), weights(second))


def test_resume_without_a_checkpoint_starts(make_objective, make_dataset, tmp_path):
    history = fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path, resume=True))
    assert len(history.rows) == 1


def test_fit_without_resume_starts_afresh(make_objective, make_dataset, tmp_path):
    config = training(stages=(Stage(epochs=2, lr=1e-2),))
    for _ in range(2):
        objective = make_objective()
        history = fit(objective, make_dataset(), config, scripted((0.9, 1), (0.5, 1)), Run(folder=tmp_path))
    assert len(history.rows) == 2


def test_interrupted_new_fit_does_not_resume_the_old_one(make_objective, make_dataset, tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))

    def stop(_text: str) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path, on_step=stop))
    rows: list[dict[str, Any]] = []
    again = Run(folder=tmp_path, resume=True, on_epoch=rows.append)
    fit(make_objective(), make_dataset(), training(), rising(), again)
    assert len(rows) == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damaged_checkpoint_starts_again_and_says_so(damage, make_objective, make_dataset, tmp_path, caplog):
    config = training(stages=(Stage(epochs=2, lr=1e-2),))
    whole = make_objective()
    fit(whole, make_dataset(), config, rising(), Run(folder=tmp_path))
    path = tmp_path / "last.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    objective = make_objective()
    history = fit(objective, make_dataset(), config, rising(), Run(folder=tmp_path, resume=True))
    assert "damaged" in caplog.text
    assert len(history.rows) == 2
    assert same(weights(objective), weights(whole))


def test_checkpoint_of_another_model_is_refused(make_objective, make_dataset, tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    with pytest.raises(MedvitError, match="another configuration"):
        fit(make_objective(random=True), make_dataset(), training(), rising(), Run(folder=tmp_path, resume=True))


def test_checkpoint_of_another_head_is_refused(make_objective, make_dataset, tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    other = make_objective(counts=(1, 1, 1))
    with pytest.raises(MedvitError, match="another configuration"):
        fit(other, make_dataset(), training(), rising(), Run(folder=tmp_path, resume=True))


def test_no_part_files_are_left(make_objective, make_dataset, tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    assert not list(tmp_path.rglob("*.part"))
