"""A batch that is killed, at random and in the middle of each write, ends with what one that was not leaves."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def report(folder: Path, series: int, kills: int, boundaries: int) -> dict[str, Any]:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: writes cannot be counted")
    library = folder / "count_writes.so"
    source = Path(__file__).with_name("count_writes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    seed = random.SystemRandom().randrange(1 << 20)
    numbers = map(str, (series, kills, boundaries, seed))
    command = [sys.executable, "-W", "ignore", "-m", "tests.deployment.killed_batches", str(folder), *numbers]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"seed": seed}


def check(found: dict[str, Any], kills: int, boundaries: int) -> None:
    for kind, least in (("random", kills), ("boundaries", boundaries)):
        assert found[kind]["differ"] == [], found["seed"]
        assert found[kind]["unreadable"] == 0, found["seed"]
        assert found[kind]["kills"] >= least


def test_killed_five_times_and_in_the_middle_of_some_writes(tmp_path):
    check(report(tmp_path, series=24, kills=5, boundaries=3), kills=5, boundaries=3)


@pytest.mark.slow
def test_killed_a_hundred_times_and_in_the_middle_of_each_write(tmp_path):
    """Of 300 series one in ten is bad."""
    found = report(tmp_path, series=300, kills=100, boundaries=0)
    check(found, kills=100, boundaries=found["boundaries"]["calls"])
