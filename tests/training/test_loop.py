import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from medvit.config import Stage, TrainingConfig
from medvit.data.dataset import collate
from medvit.data.sampling import epoch_batches
from medvit.records import Case
from medvit.training import loop
from medvit.training.loop import Run, fit
from medvit.training.optimizer import course, parameter_groups
from medvit.training.waiting import WaitingClock
from tests.training.fits import (
    BACKBONE,
    HEAD_THEN_ALL,
    Weights,
    first_moments,
    rising,
    same,
    scripted,
    training,
    weights,
)

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
    """One stage by plain torch: groups of batches, each divided by all its cases, clipped once, one step."""
    (stage,) = config.stages
    optimizer = torch.optim.AdamW(parameter_groups(objective, stage), fused=True)
    steps = math.ceil(math.ceil(len(dataset) / config.batch_size) / config.accumulate)
    factor = course(stage, steps * stage.epochs)
    peaks = [group["lr"] for group in optimizer.param_groups]
    taken = 0
    for epoch in range(stage.epochs):
        dataset.epoch = epoch
        batches = epoch_batches(dataset.labels, epoch, batch_size=config.batch_size, seed=config.seed)
        for start in range(0, len(batches), config.accumulate):
            group = batches[start : start + config.accumulate]
            optimizer.zero_grad()
            totals = torch.tensor([float(sum(map(len, group)))])  # cases, as no class counts more than another
            for batch in group:
                objective({**collate([dataset[i] for i in batch]), "totals": totals}, 0.0)["loss"].backward()
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


# what is reported


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


def test_threads_are_as_many_as_asked_for(make_objective, make_dataset, tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            fit(
                make_objective(),
                make_dataset(),
                training(threads=threads),
                rising(),
                Run(folder=tmp_path / f"{threads}"),
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_each_groups_rate_ends_at_a_share_of_its_own_peak(make_objective, make_dataset, tmp_path):
    stage = Stage(epochs=3, lr=1e-3, backbone_lr=1e-6, min_lr=0.01)
    last = fit(make_objective(), make_dataset(), training(stages=(stage,)), rising(), Run(folder=tmp_path)).rows[-1]
    assert (last["lr"], last["lr_backbone"]) == pytest.approx((1e-5, 1e-8))


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
