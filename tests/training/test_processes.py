"""Several processes as one: each works on its part, and every one has all results in order."""

import json
import os
import subprocess
import sys

import pytest

from medvit.training import processes

PROGRAM = """
import json, os, sys
from pathlib import Path
from medvit.training import processes
with processes.together():
    found = processes.shared(list(range(int(sys.argv[1]))), lambda mine: [(one, os.environ["RANK"]) for one in mine])
    told = processes.agreed(f"from {processes.rank()}")
    processes.wait()
    Path(sys.argv[2], f"{processes.rank()}.json").write_text(json.dumps([found, told, processes.count()]))
"""


@pytest.mark.parametrize("count", [0, 1, 5])
def test_work_is_shared_and_results_are_everywhere(count, tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{29700 + count}"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(count), str(tmp_path)], env={**environment, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    expected = [[[one, str(one % 2)] for one in range(count)], "from 0", 2]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected, expected]


def test_alone_everything_is_done_here():
    with processes.together():
        assert processes.shared([1, 2], lambda mine: [2 * one for one in mine]) == [2, 4]
        assert (processes.agreed("x"), processes.rank(), processes.count(), processes.first()) == ("x", 0, 1, True)
