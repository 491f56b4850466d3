"""Loader processes end with the training that they read for."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLED_WITH_THE_LOCK = """
import json, os, signal
from medvit.training.feeding import Feeding
from tests.training.fits import make_dataset, training
feeding = Feeding(make_dataset(8), training(batch_size=1), rank=0, processes=1)
stream = iter(feeding.loader(feeding.groups(0), 2))
next(stream)
stream._workers_done_event._cond.acquire()  # as while it says that all is done
print(json.dumps([worker.pid for worker in stream._workers]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tell a process that its parent has died")
def test_loader_processes_do_not_outlive_a_training_that_is_killed_at_the_worst_moment():
    """Two of them waited for ever for a lock of the dead, found in the twentieth kill of a fit."""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", KILLED_WITH_THE_LOCK], cwd=root, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        workers = json.loads(killed.stdout.readline())
        killed.wait()
    deadline = time.monotonic() + 30
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if lives(pid)]
