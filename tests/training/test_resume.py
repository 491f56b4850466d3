"""A fit that was interrupted goes on to the same end; kills are in test_kills.py."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvit.config import Stage
from medvit.records import UsageError
from medvit.training import loop
from medvit.training.checkpoint import load
from medvit.training.loop import Run, fit
from medvit.training.waiting import WaitingClock
from tests.training.fits import (
    HEAD_THEN_ALL,
    judged,
    make_dataset,
    make_objective,
    rising,
    same,
    scripted,
    training,
    weights,
)


class Interrupted(Exception):  # noqa: N818  no error
    pass


def interrupt_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Interrupted

    return stop


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
@pytest.mark.parametrize("select", ["best", "last"])
def test_interrupted_fit_goes_on_bit_for_bit(epoch, select, tmp_path, monkeypatch):
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


def test_finished_fit_is_not_trained_again(tmp_path):
    first, second = make_objective(), make_objective()
    config = training(stages=(Stage(epochs=2, lr=1e-2),))
    fit(first, make_dataset(), config, scripted((0.9, 1), (0.5, 1)), Run(folder=tmp_path))
    fit(second, make_dataset(), config, scripted(), Run(folder=tmp_path, resume=True))
    assert same(weights(first), weights(second))


def test_resume_without_a_checkpoint_starts(tmp_path):
    history = fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path, resume=True))
    assert len(history.rows) == 1


def test_fit_without_resume_starts_afresh(tmp_path):
    config = training(stages=(Stage(epochs=2, lr=1e-2),))
    for _ in range(2):
        objective = make_objective()
        history = fit(objective, make_dataset(), config, scripted((0.9, 1), (0.5, 1)), Run(folder=tmp_path))
    assert len(history.rows) == 2


def test_interrupted_new_fit_does_not_resume_the_old_one(tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))

    def stop(_text: str) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path, on_step=stop))
    rows: list[dict[str, Any]] = []
    again = Run(folder=tmp_path, resume=True, on_epoch=rows.append)
    fit(make_objective(), make_dataset(), training(), rising(), again)
    assert len(rows) == 1


def cut_at(batch: int, **run: Any) -> Run:
    """Interrupted after so many batches of this life."""
    left = [batch]

    def stop(_text: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    return Run(on_step=stop, **run)


# 5 batches in an epoch: steps of 2, 2, 1; the stage ends at 10
@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (3, 2), (4, 0), (7, 0), (10, 2)])
def test_fit_interrupted_within_an_epoch_goes_on_bit_for_bit(batch, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WaitingClock", lambda: WaitingClock(lambda: 0.0))
    config = training(stages=HEAD_THEN_ALL, batch_size=1, accumulate=2, checkpoint_minutes=0, ema=0.9)
    whole, cut, resumed = (make_objective(random=True) for _ in range(3))
    expected = fit(whole, make_dataset(5), config, judged(whole), Run(folder=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        fit(cut, make_dataset(5), config, judged(cut), cut_at(batch, folder=tmp_path / "cut"))
    go_on = Run(folder=tmp_path / "cut", resume=True, workers=workers)
    history = fit(resumed, make_dataset(5), config, judged(resumed), go_on)
    assert same(weights(resumed), weights(whole))
    assert history == expected
    (first, _), (second, _) = (load(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert same(first, second)


def test_checkpoints_within_an_epoch_come_as_often_as_asked(tmp_path):
    def position(minutes: float) -> dict[str, Any]:
        folder = tmp_path / str(minutes)
        with pytest.raises(Interrupted):
            fit(
                make_objective(),
                make_dataset(),
                training(stages=(Stage(epochs=2),), checkpoint_minutes=minutes),
                rising(),
                cut_at(5, folder=folder),
            )
        found: dict[str, Any] = load(folder / "last.safetensors")[1]["position"]
        return found

    assert (position(0)["epoch"], position(0)["steps"]) == (1, 2)
    assert (position(60)["epoch"], position(60)["steps"]) == (1, 0)


def test_number_of_threads_is_that_of_the_interrupted_fit(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(Interrupted):
            fit(
                make_objective(),
                make_dataset(),
                training(threads=0, checkpoint_minutes=0),
                rising(),
                cut_at(1, folder=tmp_path),
            )
        torch.set_num_threads(1)
        fit(
            make_objective(),
            make_dataset(),
            training(threads=0, checkpoint_minutes=0),
            rising(),
            Run(folder=tmp_path, resume=True),
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# damage

THREE = training(stages=(Stage(epochs=3, lr=1e-2),))
SCRIPT = ((0.5, 1), (0.7, 1), (0.6, 1))  # the second epoch is best
DAMAGES = [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda _: b""]


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def fit_three(folder: Path, *script: tuple[float, float], resume: bool) -> Any:
    objective = make_objective(random=True)
    history = fit(objective, make_dataset(), THREE, scripted(*script), Run(folder=folder, resume=resume))
    return weights(objective), [row["epoch"] for row in history.rows], history.best_epoch


@pytest.mark.parametrize("how", DAMAGES, ids=["cut short", "one bit", "empty"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(how, tmp_path, caplog):
    expected = fit_three(tmp_path, *SCRIPT, resume=False)
    damage(tmp_path / "last.safetensors", how)
    found = fit_three(tmp_path, SCRIPT[2], resume=True)  # only the third epoch is judged again
    assert same(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert "last.safetensors is damaged" in caplog.text
    assert "goes on from the checkpoint before the last" in caplog.text


def test_missing_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    expected = fit_three(tmp_path, *SCRIPT, resume=False)
    (tmp_path / "last.safetensors").unlink()
    assert same(fit_three(tmp_path, SCRIPT[2], resume=True)[0], expected[0])
    assert "last.safetensors is missing" in caplog.text


def test_best_weights_of_an_epoch_that_is_repeated_are_made_again(tmp_path):
    script = ((0.5, 1), (0.6, 1), (0.7, 1))
    expected = fit_three(tmp_path, *script, resume=False)
    damage(tmp_path / "last.safetensors", DAMAGES[0])  # the one before knows of the second epoch as best
    found = fit_three(tmp_path, script[2], resume=True)
    assert same(found[0], expected[0])
    assert found[2] == 3


def test_training_starts_again_where_both_checkpoints_are_damaged_and_says_so(tmp_path, caplog):
    expected = fit_three(tmp_path, *SCRIPT, resume=False)
    for name in ("last", "previous"):
        damage(tmp_path / f"{name}.safetensors", DAMAGES[1])
    found = fit_three(tmp_path, *SCRIPT, resume=True)
    assert same(found[0], expected[0])
    assert "training starts again from its first epoch" in caplog.text


def test_training_starts_again_where_the_best_weights_are_damaged(tmp_path, caplog):
    expected = fit_three(tmp_path, *SCRIPT, resume=False)
    damage(tmp_path / "best.safetensors", DAMAGES[1])
    assert same(fit_three(tmp_path, *SCRIPT, resume=True)[0], expected[0])
    assert "best.safetensors is missing or damaged" in caplog.text


def test_the_good_checkpoint_outlives_the_first_save_after_a_damaged_one(tmp_path, monkeypatch):
    fit_three(tmp_path, *SCRIPT, resume=False)
    damage(tmp_path / "last.safetensors", DAMAGES[1])
    rename = os.replace

    def die_before_the_new_name(source: Any, target: Any) -> None:
        if Path(target).name == "last.safetensors":
            raise Interrupted
        rename(source, target)

    monkeypatch.setattr("os.replace", die_before_the_new_name)
    with pytest.raises(Interrupted):
        fit_three(tmp_path, SCRIPT[2], resume=True)
    assert load(tmp_path / "previous.safetensors") is not None


# another fit


def test_checkpoint_of_another_model_is_refused(tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    with pytest.raises(UsageError, match="another configuration"):
        fit(make_objective(random=True), make_dataset(), training(), rising(), Run(folder=tmp_path, resume=True))


def test_checkpoint_of_another_head_is_refused(tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    other = make_objective(counts=(1, 1, 1))
    with pytest.raises(UsageError, match="another configuration"):
        fit(other, make_dataset(), training(), rising(), Run(folder=tmp_path, resume=True))


@pytest.mark.parametrize(
    ("config", "labels", "names"),
    [
        (training(batch_size=3), None, "batch_size"),
        (training(seed=1), None, "seed"),
        (training(), [0, 1, 0, 1, 1, 1], "cases"),
    ],
)
def test_checkpoint_of_another_fit_is_refused_and_kept(config, labels, names, tmp_path):
    fit(make_objective(), make_dataset(6), training(), rising(), Run(folder=tmp_path))
    kept = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(UsageError, match=f"another configuration .*{names}"):
        fit(make_objective(), make_dataset(6, labels=labels), config, rising(), Run(folder=tmp_path, resume=True))
    assert (tmp_path / "last.safetensors").read_bytes() == kept


def test_no_part_files_are_left(tmp_path):
    fit(make_objective(), make_dataset(), training(), rising(), Run(folder=tmp_path))
    assert not list(tmp_path.rglob("*.part"))
