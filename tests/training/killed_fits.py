"""Fits that are killed, in processes of their own: `python -m tests.training.killed_fits FOLDER KILLS SEED`.

One process imports what takes long and forks a child for each life of a fit. SIGKILL comes at random moments, with and
without loader processes, or before the n-th call of what makes a checkpoint durable. The last line of output is JSON:
for each of these, how many `kills` came, and what `differs` from the fit that was never killed, in one process.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from medvit.config import Stage, TrainingConfig
from medvit.training import checkpoint
from medvit.training.loop import Run, fit
from tests.training.fits import judged, make_dataset, make_objective, training

CALLS = 10
"""Flushes and renames of two steps, and of an epoch's end."""
FORK = multiprocessing.get_context("fork")


def settings(kills: int) -> TrainingConfig:
    """Every kind of state: stages, sizes, averaged weights, accumulation with a last partial step, every step saved.

    There are three steps in an epoch, and a life takes one or two.
    """
    stages = (
        Stage(name="head", trainable="head", epochs=1 + kills // 2, lr=1e-2, size=16),
        Stage(name="all", epochs=2 + kills // 2, lr=1e-2),
    )
    return training(stages=stages, batch_size=1, accumulate=3, ema=0.9, patience=kills, checkpoint_minutes=0)


def live(folder: Path, workers: int, kills: int, on_step: Callable[[str], None] = lambda _: None) -> None:
    """One life of the fit: from the last checkpoint to the end, if it is let."""
    objective = make_objective(random=True)
    run = Run(folder=folder, resume=True, workers=workers, on_step=on_step)
    fit(objective, make_dataset(8, augmented=True), settings(kills), judged(objective), run)
    save_file(objective.state_dict(), folder / "final.safetensors")


def kill_at_random(folder: Path, workers: int, kills: int, rng: random.Random) -> bool:
    """Live until a random moment after a few steps; whether the kill came in time."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=live, args=(folder, workers, kills, lambda _: sender.send(None)))
    child.start()
    sender.close()
    for _ in range(rng.randrange(1, 4)):
        try:
            receiver.recv()
        except EOFError:  # done before
            break
    time.sleep(rng.random() * 0.03)  # anywhere between two steps
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def kill_within(folder: Path, call: int, kills: int) -> bool:
    """Live until before the n-th flush or rename; whether there was one."""

    def doomed() -> None:
        left = [call]

        def guard(function: Callable[..., Any]) -> Callable[..., Any]:
            def guarded(*arguments: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return guarded

        os.fsync, os.replace = guard(os.fsync), guard(os.replace)
        live(folder, 0, kills)

    child = FORK.Process(target=doomed)
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


def finish(folder: Path, workers: int, kills: int) -> None:
    child = FORK.Process(target=live, args=(folder, workers, kills))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"the fit ended with {child.exitcode}")


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors and figures that are not equal bit for bit."""
    found = []
    for name in ("last", "best", "final"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        found += [f"{name} {key}" for key in first.keys() ^ second.keys()]
        found += [f"{name} {key}" for key in first.keys() & second.keys() if not first[key].equal(second[key])]
    first, second = record(one), record(other)
    return found + [key for key in first.keys() | second.keys() if first[key] != second[key]]


def record(folder: Path) -> dict[str, Any]:
    """What is no tensor: of the checkpoint, and of the table of metrics."""
    about = checkpoint.load(folder / "last.safetensors")[1]
    table = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return about | {"rows": timeless(about["rows"]), "table": timeless(table)}


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "waiting_share"} for row in rows]


def main(folder: Path, kills: int, seed: int) -> None:
    whole, report = folder / "whole", {}
    finish(whole, 0, kills)
    for name, workers in (("alone", 0), ("with workers", 2)):
        cut, rng = folder / name, random.Random(seed)
        done = sum(kill_at_random(cut, workers, kills, rng) for _ in range(kills))
        finish(cut, workers, kills)
        report[name] = {"kills": done, "differs": differences(whole, cut)}
    cut = folder / "writing"
    done = sum(kill_within(cut, call, kills) for call in range(CALLS))
    finish(cut, 0, kills)
    report["writing"] = {"kills": done, "differs": differences(whole, cut)}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
