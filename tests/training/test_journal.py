import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medvit.training.journal import Board

ROWS = [{"epoch": 1, "stage": "all", "loss": 0.5, "val_auroc": math.nan}, {"epoch": 2, "stage": "all", "loss": 0.25}]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard reads."""
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_board_reads_back_each_epoch(tmp_path):
    board = Board(tmp_path / "deep" / "board")
    for row in ROWS:
        board.add(row)
    assert scalars(board.path.parent, "loss") == [(1, 0.5), (2, 0.25)]
    assert math.isnan(scalars(board.path.parent, "val_auroc")[0][1])


def test_board_of_a_resumed_fit_has_each_epoch_once(tmp_path):
    interrupted = Board(tmp_path)
    for row in ROWS:
        interrupted.add(row)
    resumed = Board(tmp_path, ROWS[:1])  # its second epoch was not saved, and is repeated
    resumed.add({"epoch": 2, "loss": 0.125})
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 0.125)]


@pytest.mark.parametrize("name", ["stage", "epoch"])
def test_only_figures_are_shown(name, tmp_path):
    board = Board(tmp_path, ROWS)
    assert name not in EventAccumulator(str(board.path)).Reload().Tags()["scalars"]
