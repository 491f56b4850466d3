"""A disk that is full: told in words, and nothing is lost."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medvit.config import Stage
from medvit.io.disk import DiskFullError, write_whole
from medvit.records import UsageError
from medvit.training.checkpoint import load
from medvit.training.journal import Board, write_metrics
from medvit.training.loop import Run, fit
from tests.training.fits import judged, make_dataset, make_objective, same, training, weights

TWO = training(stages=(Stage(epochs=2, lr=1e-2),))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond it: as on a full disk, some of the file is there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fit_two(folder: Path, **run: Any) -> Any:
    objective = make_objective(random=True)
    fit(objective, make_dataset(), TWO, judged(objective), Run(folder=folder, **run))
    return weights(objective)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_checkpoint_that_does_not_fit_leaves_the_old_one_and_no_half_file(share, tmp_path):
    whole = fit_two(tmp_path / "whole")
    folder = tmp_path / "cut"
    limit: list[Any] = []

    def fill(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            size = (folder / "last.safetensors").stat().st_size
            limit.append(largest_file(int(size * share)))
            limit[0].__enter__()

    try:
        with pytest.raises(UsageError, match=r"the disk is full.*needs [\d.]+ MB.*--resume"):
            fit_two(folder, on_epoch=fill)
    finally:
        limit[0].__exit__(None, None, None)
    assert load(folder / "last.safetensors")[1]["rows"][-1]["epoch"] == 1
    assert not list(folder.rglob("*.part"))
    assert same(fit_two(folder, resume=True), whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_is_told_wherever_it_shows(number, function, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"os.{function}", fail)
    with pytest.raises(DiskFullError, match=r"file needs 5\.0 MB"):
        write_whole(path, bytes(5_000_000))
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_other_errors_of_the_disk_are_not_called_full(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "file", b"new")


def test_training_does_not_begin_where_two_checkpoints_do_not_fit(tmp_path, monkeypatch):
    fit_two(tmp_path / "measured")
    size = (tmp_path / "measured" / "last.safetensors").stat().st_size
    steps: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(1.5 * size)))
    with pytest.raises(UsageError, match=r"two checkpoints need [\d.]+ MB and its disk has [\d.]+ MB free"):
        fit_two(tmp_path / "new", on_step=steps.append)
    assert not steps
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(2.5 * size)))
    fit_two(tmp_path / "new", on_step=steps.append)


def test_file_is_the_old_or_the_new_one_and_can_keep_the_old(tmp_path):
    path, kept = tmp_path / "file", tmp_path / "kept"
    write_whole(path, b"one", keep_as=kept)
    assert not kept.exists()
    write_whole(path, b"two", keep_as=kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"two", b"one")


def test_metrics_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [{"epoch": 1}])
    with largest_file(100), pytest.raises(DiskFullError):
        write_metrics(path, [{"epoch": number} for number in range(100)])
    assert path.read_text() == '{"epoch": 1}\n'


def test_events_on_a_full_disk_are_an_error_at_once(tmp_path):
    """TensorBoard's own writer fails in a thread: the training hangs, or dies later of something else."""
    board = Board(tmp_path)
    with largest_file(60), pytest.raises(DiskFullError):
        board.add({"epoch": 1, "loss": 0.5, "val_loss": 0.7})
