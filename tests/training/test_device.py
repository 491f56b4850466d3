"""Two processes under torchrun against one, on the same cases in each step."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medvit.records import UsageError
from medvit.training.checkpoint import load
from medvit.training.loop import Run, fit
from tests.training.fits import make_dataset, make_objective, rising, training
from tests.training.shared_fits import SCENARIOS, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes trained, and what each of them saw."""
    folder = tmp_path_factory.mktemp("shared")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "tests.training.shared_fits", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def gradient(folder: Path) -> Tensor:
    """Of one step: a tenth of it is AdamW's first moment."""
    tensors = load(folder / "last.safetensors")[0]
    return torch.cat([value.flatten() for name, value in sorted(tensors.items()) if name.endswith("exp_avg")])


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("one step")])
def test_gradient_of_two_processes_is_that_of_one(name, shared, tmp_path):
    run(name, tmp_path, processes=1)
    alone, together = gradient(tmp_path / name), gradient(shared[0] / name)
    assert float((together - alone).norm() / alone.norm()) < 1e-5


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("twenty")])
def test_loss_after_twenty_steps_of_two_processes_is_that_of_one(name, shared, tmp_path):
    alone = run(name, tmp_path, processes=1)
    together = shared[1][0][name]
    for key in ("loss", "val_loss"):
        assert together[-1][key] == pytest.approx(alone[-1][key], abs=1e-3)
    assert together[-1]["loss"] < alone[0]["loss"] - 1e-2  # it has moved


def test_all_processes_see_the_same_figures_and_end_with_the_same_weights(shared):
    first, second = shared[1]
    for name in (*SCENARIOS, "weights"):
        assert first[name] == second[name]


def test_interrupted_fit_of_two_processes_goes_on_bit_for_bit(shared):
    assert [seen["interrupted"] for seen in shared[1]] == [True, True]
    assert [seen["resumed"] for seen in shared[1]] == [[], []]


def test_loss_that_is_no_number_in_one_process_stops_all_with_the_same_words(shared):
    first, second = (seen["spoilt"] for seen in shared[1])
    assert "the loss became nan" in first
    assert first == second


def test_only_one_process_writes(shared):
    for name in SCENARIOS:
        assert len(list((shared[0] / name / "tensorboard").glob("events.*"))) == 1
        assert load(shared[0] / name / "last.safetensors")[1]["identity"]["processes"] == 2


def test_fit_of_two_processes_is_not_gone_on_with_by_one(shared):
    config, run = SCENARIOS["one step"](2), Run(folder=shared[0] / "one step", resume=True)
    with pytest.raises(UsageError, match="trained by 2 processes"):
        fit(make_objective(), make_dataset(), config, rising(), run)


def test_fewer_labelled_cases_than_processes_are_refused(tmp_path):
    dataset = make_dataset(labels=[-1, -1])
    with pytest.raises(UsageError, match="0 labelled cases cannot be shared by 1 processes"):
        fit(make_objective(), dataset, training(), rising(), Run(folder=tmp_path))
