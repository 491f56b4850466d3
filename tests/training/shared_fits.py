"""Fits shared by processes: `torchrun --nproc-per-node 2 -m tests.training.shared_fits FOLDER`.

Each process writes what it has seen to FOLDER/RANK.json; `SCENARIOS` are what one process is compared with.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medvit.config import Stage, TrainingConfig
from medvit.records import MedvitError
from medvit.training.loop import Run, fit
from tests.training.fits import Objective, judged, make_dataset, make_objective, training

LABELS = [0] * 12 + [1] * 4

STEP = {"stages": (Stage(epochs=1, lr=1e-3),), "clip_norm": 1e6}
STEPS = {"stages": (Stage(epochs=5, lr=1e-3),)}
SCENARIOS: dict[str, Callable[[int], TrainingConfig]] = {
    # so many processes -> the same cases in each step
    "one step": lambda processes: training(batch_size=16 // processes, **STEP),
    "one step, accumulated": lambda processes: training(batch_size=4 // processes, accumulate=4, **STEP),
    "twenty steps": lambda processes: training(batch_size=4 // processes, **STEPS),
    "twenty steps, accumulated": lambda processes: training(batch_size=2 // processes, accumulate=2, **STEPS),
}
STAGES = (Stage(name="head", trainable="head", epochs=1, lr=1e-2, size=16), Stage(name="all", epochs=3, lr=1e-2))


def run(name: str, folder: Path, processes: int) -> list[dict[str, Any]]:
    """Rows of metrics of a scenario; its checkpoint is in the folder of its name."""
    objective = make_objective(counts=(12, 4), class_weights=True)
    config = SCENARIOS[name](processes)
    rows: list[dict[str, Any]] = fit(
        objective, make_dataset(labels=LABELS), config, judged(objective), Run(folder=folder / name)
    ).rows
    return rows


def run_in_stages(folder: Path, *, resume: bool = False, stop: int = 0) -> Objective:
    """With all that is random; `stop`: the validation at which every process is interrupted."""
    objective = make_objective(random=True)
    validate, left = judged(objective), [stop]

    def judge() -> dict[str, float]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return validate()

    config = training(stages=STAGES, batch_size=1, accumulate=3, checkpoint_minutes=0, ema=0.9, patience=3)
    fit(objective, make_dataset(10, augmented=True), config, judge, Run(folder=folder, resume=resume))
    return objective


def run_spoilt(folder: Path, rank: int) -> str:
    """The error, where the loss of one process alone is no number."""
    objective = make_objective()
    if rank == 1:
        objective.register_forward_hook(lambda _, __, result: {"loss": result["loss"] * float("nan")})
    try:
        fit(objective, make_dataset(8), training(), judged(objective), Run(folder=folder))
    except MedvitError as error:
        return str(error)
    return ""


def main(folder: Path, rank: int, processes: int) -> None:
    seen: dict[str, Any] = {name: run(name, folder, processes) for name in SCENARIOS}
    whole = run_in_stages(folder / "whole").state_dict()
    try:
        run_in_stages(folder / "cut", stop=3)
    except KeyboardInterrupt:
        seen["interrupted"] = True
    resumed = run_in_stages(folder / "cut", resume=True).state_dict()
    seen["resumed"] = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    seen["weights"] = sum(float(value.double().sum()) for value in whole.values())
    seen["spoilt"] = run_spoilt(folder / "spoilt", rank)
    (folder / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
