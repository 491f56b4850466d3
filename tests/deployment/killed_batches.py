"""Batches that are killed: `python -m tests.deployment.killed_batches FOLDER SERIES KILLS BOUNDARIES SEED`.

One process imports what takes long and forks a child for each life of a batch. SIGKILL comes at random moments of a run
over SERIES series, and, where `count_writes.c` is preloaded, at BOUNDARIES of the writes, flushes and renames of a run
over three (0: at each). The last line of output is JSON: for both, how many `kills` came, which outputs `differ` from
those of the batch that was never killed, and how many ledgers were `unreadable` after a kill.
"""

import ctypes
import json
import multiprocessing
import random
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from medvit.deployment import predict_folder
from tests.deployment.batches import NOON, make_model, outputs, write_export

START_S = 4.0
"""Until a life has listed the files and the process that composes reports runs, twice over: lives must get on."""

FORK = multiprocessing.get_context("fork")


def live(export: Path, output: Path, calls: int = 0) -> None:
    """One life of a batch, which ends at the n-th call that changes a file of the output, if it is given."""
    if calls:
        ctypes.CDLL(None).medvit_arm(str(output).encode(), calls)
    predict_folder(export, make_model(), output, clock=lambda: NOON)


def count(export: Path, output: Path, receiver: Any) -> None:
    """A life in which calls are counted."""
    library = ctypes.CDLL(None)
    library.medvit_arm(str(output).encode(), 0)
    predict_folder(export, make_model(), output, clock=lambda: NOON)
    receiver.send(ctypes.c_int.in_dll(library, "medvit_count").value)


def run(*arguments: Any, kill_after: float | None = None) -> bool:
    """A life in a process of its own; whether it was killed."""
    child = FORK.Process(target=live, args=arguments)
    child.start()
    child.join(kill_after)
    if kill_after is not None:
        child.kill()
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL), child.exitcode
    return child.exitcode != 0


def readable(output: Path) -> bool:
    """Whether the ledger is whole; one that was not begun is."""
    if not (output / "ledger.sqlite").exists():
        return True
    with closing(sqlite3.connect(output / "ledger.sqlite")) as ledger:
        return bool(ledger.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


def difference(one: Path, other: Path) -> list[str]:
    mine, theirs = outputs(one), outputs(other)
    return sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))


def killed_at_random(folder: Path, series: int, kills: int, rng: random.Random) -> dict[str, Any]:
    write_export(folder / "export", series)
    began = time.monotonic()
    run(folder / "export", folder / "whole")
    seconds = time.monotonic() - began
    came, unreadable, differ, runs = 0, 0, list[str](), 0
    while came < kills:
        output = folder / f"killed{runs}"
        while run(folder / "export", output, kill_after=rng.uniform(0, START_S + 2 * seconds / kills)):
            came += 1
            unreadable += not readable(output)
        differ += difference(folder / "whole", output)
        shutil.rmtree(output)
        runs += 1
    return {"kills": came, "differ": differ, "unreadable": unreadable, "runs": runs, "seconds": seconds}


def killed_at_boundaries(folder: Path, most: int, rng: random.Random) -> dict[str, Any]:
    write_export(folder / "export", 3, bad=0.34)
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=count, args=(folder / "export", folder / "whole", sender))
    child.start()
    calls = receiver.recv()
    child.join()
    chosen = range(1, calls + 1) if not most else sorted(rng.sample(range(1, calls + 1), most))
    came, unreadable, differ = 0, 0, list[str]()
    for number in chosen:
        output = folder / "killed"
        came += run(folder / "export", output, number)
        unreadable += not readable(output)
        run(folder / "export", output)
        differ += [f"{number}: {name}" for name in difference(folder / "whole", output)]
        shutil.rmtree(output)
    return {"calls": calls, "tried": len(chosen), "kills": came, "differ": differ, "unreadable": unreadable}


def main() -> None:
    folder = Path(sys.argv[1])
    series, kills, boundaries, seed = map(int, sys.argv[2:])
    rng = random.Random(seed)
    found = {"random": killed_at_random(folder / "random", series, kills, rng)}
    if hasattr(ctypes.CDLL(None), "medvit_arm"):
        found["boundaries"] = killed_at_boundaries(folder / "boundaries", boundaries, rng)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
