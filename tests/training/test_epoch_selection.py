"""Which weights are judged and kept."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from medvit.config import Stage
from medvit.records import UsageError
from medvit.training.checkpoint import load
from medvit.training.loop import Run, fit
from tests.training.fits import (
    BACKBONE,
    HEAD_THEN_ALL,
    Weights,
    judged,
    make_dataset,
    make_objective,
    rising,
    same,
    scripted,
    training,
    weights,
)


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
def test_best_epoch_is_reloaded(script, best, tmp_path):
    objective = make_objective()
    config = training(stages=(Stage(epochs=3, lr=1e-2),))
    seen, history = fit_watching(objective, make_dataset(), config, scripted(*script), tmp_path)
    assert history.best_epoch == best
    assert same(weights(objective), seen[best - 1])
    assert not same(seen[0], seen[1])


def test_best_epoch_is_reloaded_where_only_the_head_was_trained(tmp_path):
    objective = make_objective()
    config = training(stages=(Stage(epochs=3, lr=1e-2, trainable="head"),))
    script = scripted((0.6, 1), (0.9, 1), (0.7, 1))
    seen, _ = fit_watching(objective, make_dataset(), config, script, tmp_path)
    assert same(weights(objective), seen[1])


def test_last_epoch_is_kept_where_asked(tmp_path):
    objective = make_objective()
    config = training(select="last", stages=(Stage(epochs=3, lr=1e-2),))
    script = scripted((0.6, 1), (0.9, 1), (0.7, 1))
    seen, history = fit_watching(objective, make_dataset(), config, script, tmp_path)
    assert history.best_epoch == 3
    assert same(weights(objective), seen[2])


@pytest.mark.parametrize("loss", [0.5, math.nan])
def test_weights_are_kept_where_no_epoch_can_be_compared(loss, tmp_path):
    objective = make_objective()
    config = training(stages=(Stage(epochs=2, lr=1e-2),))
    seen, history = fit_watching(
        objective, make_dataset(), config, scripted((math.nan, loss), (math.nan, loss)), tmp_path
    )
    assert history.best_epoch == 1
    assert same(weights(objective), seen[0])


def with_information(*rows: tuple[float, float]) -> Any:
    script = iter(rows)

    def validate() -> dict[str, float]:
        auroc, information = next(script)
        return {"auroc": auroc, "loss": 1.0, "target_information": information}

    return validate


def test_target_information_decides_where_asked(tmp_path):
    rows = ((0.9, 0.1), (0.8, 0.3), (0.7, 0.2))
    for select, best in (("best", 1), ("target", 2)):
        config = training(select=select, stages=(Stage(epochs=3, lr=1e-2),))
        history = fit(make_objective(), make_dataset(), config, with_information(*rows), Run(folder=tmp_path / select))
        assert history.best_epoch == best
        assert [row["val_target_information"] for row in history.rows] == [0.1, 0.3, 0.2]


def test_selection_by_target_cases_is_refused_where_there_are_none(tmp_path):
    with pytest.raises(UsageError, match=r"data\.target_sites"):
        fit(make_objective(), make_dataset(), training(select="target"), rising(), Run(folder=tmp_path))


def test_refit_stops_after_the_given_epochs_without_validation(tmp_path):
    def never() -> dict[str, float]:
        raise AssertionError("validated")

    objective = make_objective()
    history = fit(objective, make_dataset(), training(stages=HEAD_THEN_ALL), never, Run(folder=tmp_path, stop_after=3))
    assert [row["stage"] for row in history.rows] == ["head", "head", "all"]
    assert math.isfinite(history.rows[-1]["loss"])


def test_refit_takes_the_steps_of_the_full_training(tmp_path):
    whole, refit = make_objective(), make_objective()
    config = training(stages=(Stage(epochs=3, lr=1e-2),))
    seen, _ = fit_watching(whole, make_dataset(), config, rising(), tmp_path / "whole")
    fit(refit, make_dataset(), config, dict, Run(folder=tmp_path / "refit", stop_after=2))
    assert same(weights(refit), seen[1])


# patience


def epochs_run(folder: Any, *script: tuple[float, float], **settings: Any) -> list[tuple[int, str]]:
    history = fit(make_objective(), make_dataset(), training(**settings), scripted(*script), Run(folder=folder))
    return [(row["epoch"], row["stage"]) for row in history.rows]


def test_stage_ends_after_so_many_epochs_without_a_better_one(tmp_path):
    script = ((0.5, 1), (0.7, 1), (0.6, 1), (0.7, 1), (0.1, 1))
    assert [epoch for epoch, _ in epochs_run(tmp_path, *script, stages=(Stage(epochs=9),), patience=2)] == [1, 2, 3, 4]


def test_patience_begins_anew_in_each_stage(tmp_path):
    stages = (Stage(name="a", epochs=5, trainable="head"), Stage(name="b", epochs=3))
    # in the second stage, epochs are better than before in that stage, and worse than the best of the first
    script = ((0.9, 1), (0.8, 1), (0.3, 1), (0.4, 1), (0.5, 1))
    rows = epochs_run(tmp_path, *script, stages=stages, patience=1)
    assert rows == [(1, "a"), (2, "a"), (6, "b"), (7, "b"), (8, "b")]  # as planned: what was left out is not counted


def test_rates_begin_anew_after_a_stage_that_ended_early(tmp_path):
    stages = (Stage(name="a", epochs=5, lr=1e-3), Stage(name="b", epochs=1, lr=1e-4, min_lr=1.0, warmup=0.0))
    config = training(stages=stages, patience=1)
    history = fit(
        make_objective(), make_dataset(), config, scripted((0.9, 1), (0.8, 1), (0.7, 1)), Run(folder=tmp_path)
    )
    assert history.rows[-1]["lr"] == pytest.approx(1e-4)


def test_patience_is_remembered_by_a_resumed_fit(tmp_path):
    class InterruptedError_(Exception):  # noqa: N801, N818
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise InterruptedError_

    config = training(stages=(Stage(epochs=9),), patience=2)
    with pytest.raises(InterruptedError_):
        fit(make_objective(), make_dataset(), config, scripted((0.7, 1), (0.6, 1)), Run(folder=tmp_path, on_epoch=stop))
    go_on = Run(folder=tmp_path, resume=True)
    assert len(fit(make_objective(), make_dataset(), config, scripted((0.5, 1)), go_on).rows) == 3


# sizes


def sizes_seen(objective: Any) -> list[int]:
    seen: list[int] = []
    objective.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]["input"].shape[-1]))
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epochs", [(2, 1), (1, 3)])  # a size that went by epoch / total would be right in one of them
def test_each_stage_sees_its_size_and_the_last_one_the_full_one(epochs, workers, tmp_path):
    objective = make_objective()
    stages = (Stage(name="small", epochs=epochs[0], size=16), Stage(name="full", epochs=epochs[1]))
    seen = sizes_seen(objective)
    dataset = make_dataset(4, augmented=True)
    fit(objective, dataset, training(stages=stages), rising(), Run(folder=tmp_path, workers=workers))
    assert seen == [16] * 2 * epochs[0] + [32] * 2 * epochs[1]
    assert objective.classifier.backbone.size == 32


def test_refit_that_ends_in_a_small_stage_leaves_the_model_at_full_size(tmp_path):
    stages = (Stage(name="small", epochs=2, size=16), Stage(name="full", epochs=1))
    objective = make_objective()
    shape = objective.classifier.backbone.model.pos_embed.shape
    run = Run(folder=tmp_path, stop_after=1)
    fit(objective, make_dataset(augmented=True), training(stages=stages), dict, run)
    assert objective.classifier.backbone.size == 32
    assert objective.classifier.backbone.model.pos_embed.shape == shape


def test_position_embedding_learns_at_a_small_size(tmp_path):
    stages = (Stage(name="small", epochs=3, size=16, lr=1e-2, backbone_lr=1e-2), Stage(name="full", epochs=1, lr=1e-9))
    objective, only_resized = make_objective(), make_objective().classifier.backbone
    fit(objective, make_dataset(augmented=True), training(stages=stages), rising(), Run(folder=tmp_path))
    for px in (16, 32):
        only_resized.set_size(px)
    after = objective.classifier.backbone.model.pos_embed.detach()
    assert (after - only_resized.model.pos_embed.detach())[:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize(("select", "best"), [("best", 1), ("target", 2)])
def test_target_labels_never_decide(select, best, tmp_path):
    script = iter(((0.9, 0.1, 0.2), (0.8, 0.3, 0.3), (0.7, 0.2, 1.0)))

    def validate() -> dict[str, float]:
        auroc, information, oracle = next(script)
        return {"auroc": auroc, "loss": 1.0, "target_information": information, "oracle_auroc": oracle}

    config = training(select=select, stages=(Stage(epochs=3, lr=1e-2),))
    history = fit(make_objective(), make_dataset(), config, validate, Run(folder=tmp_path))
    assert history.best_epoch == best
    assert [row["val_oracle_auroc"] for row in history.rows] == [0.2, 0.3, 1.0]


def test_size_is_rounded_to_the_patch(tmp_path):
    objective = make_objective()
    seen = sizes_seen(objective)
    stages = (Stage(name="small", epochs=1, size=18), Stage(name="full", epochs=1))
    fit(objective, make_dataset(4, augmented=True), training(stages=stages), rising(), Run(folder=tmp_path))
    assert seen == [16, 16, 32, 32]


def test_sizes_are_refused_where_features_were_computed_once(tmp_path):
    stages = (Stage(name="small", epochs=1, size=16), Stage(name="full", epochs=1))
    with pytest.raises(UsageError, match="computed once"):
        fit(make_objective(), make_dataset(), training(stages=stages), rising(), Run(folder=tmp_path))


def test_epochs_at_another_size_are_never_the_best(tmp_path):
    stages = (Stage(name="small", epochs=2, size=16, lr=1e-2), Stage(name="full", epochs=2, lr=1e-2))
    objective = make_objective()
    script = scripted((0.99, 1), (0.98, 1), (0.6, 1), (0.5, 1))
    seen, history = fit_watching(objective, make_dataset(augmented=True), training(stages=stages), script, tmp_path)
    assert history.best_epoch == 3
    assert same(weights(objective), seen[2])


def test_position_embedding_learned_at_a_small_size_is_carried_to_the_full_one(tmp_path):
    stages = (Stage(name="small", epochs=3, size=16, lr=1e-2, backbone_lr=1e-2), Stage(name="full", epochs=1, lr=1e-9))
    objective = make_objective()
    before = objective.classifier.backbone.model.pos_embed.detach().clone()
    fit(objective, make_dataset(augmented=True), training(stages=stages), rising(), Run(folder=tmp_path))
    after = objective.classifier.backbone.model.pos_embed.detach()
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after[:, 1:], after[:, 1:2].expand(-1, 4, -1), atol=1e-5)  # one place became four


# averaged weights


def reference_average(seen: list[Weights], decay: float) -> Weights:
    """Of the weights after each step, the first being those before any."""
    average = {name: value.double() for name, value in seen[0].items()}
    for step, now in enumerate(seen[1:]):
        share = min(decay, (1 + step) / (10 + step))
        average = {name: share * average[name] + (1 - share) * value.double() for name, value in now.items()}
    return average


def test_averaged_weights_are_judged_kept_and_left(tmp_path):
    objective = make_objective()
    steps, at_validation = [weights(objective)], []
    script = rising()

    def validate() -> dict[str, float]:
        at_validation.append(weights(objective))
        return script()

    objective.after_step = lambda: steps.append(weights(objective))
    config = training(stages=(Stage(epochs=3, lr=1e-2),), ema=0.3)
    fit(objective, make_dataset(), config, validate, Run(folder=tmp_path))
    for epoch, judged_weights in enumerate(at_validation, 1):
        for name, value in reference_average(steps[: 3 * epoch + 1], 0.3).items():
            torch.testing.assert_close(judged_weights[name].double(), value, atol=1e-6, rtol=1e-5)
    assert same(weights(objective), at_validation[-1])
    assert not same(weights(objective), steps[-1])
    assert all(not same(a, b) for a, b in pairwise(steps))  # the steps go on from their own weights


@pytest.mark.parametrize("run", [{}, {"stop_after": 2}])
def test_averaged_weights_are_left_without_selection_also_by_a_finished_fit(run, tmp_path):
    config = training(stages=(Stage(epochs=2, lr=1e-2),), ema=0.9, select="last")
    first, again = make_objective(), make_objective()
    fit(first, make_dataset(), config, rising(), Run(folder=tmp_path, **run))
    last = load(tmp_path / "last.safetensors")[0]
    for name, value in first.named_parameters():
        assert torch.equal(value, last[f"average.{name}"])
        assert not torch.equal(value, last[f"objective.{name}"]) or name.endswith("weight.2")
    fit(again, make_dataset(), config, rising(), Run(folder=tmp_path, resume=True, **run))
    assert same(weights(first), weights(again))


def test_average_begins_anew_with_each_stage(tmp_path):
    objective = make_objective()
    stages = (Stage(name="small", epochs=2, size=16, lr=1e-2), Stage(name="full", epochs=1, lr=1e-9, backbone_lr=1e-9))
    fit(objective, make_dataset(augmented=True), training(stages=stages, ema=0.99), rising(), Run(folder=tmp_path))
    last = load(tmp_path / "last.safetensors")[0]
    for (
        name,
        value,
    ) in objective.named_parameters():  # nothing moved in this stage: nothing of the stage before is mixed in
        torch.testing.assert_close(value, last[f"objective.{name}"], atol=1e-6, rtol=1e-5)


def test_frozen_backbone_is_not_averaged(tmp_path):
    objective = make_objective()
    before = weights(objective.classifier.backbone)
    config = training(stages=(Stage(epochs=2, lr=1e-2, trainable="head"),), ema=0.5)
    fit(objective, make_dataset(), config, judged(objective), Run(folder=tmp_path))
    assert same(weights(objective.classifier.backbone), before)
    assert not any(BACKBONE in name for name in load(tmp_path / "last.safetensors")[0])
