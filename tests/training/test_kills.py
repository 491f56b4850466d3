import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def report(folder: Path, kills: int) -> dict[str, Any]:
    seed = random.SystemRandom().randrange(1 << 20)
    command = [sys.executable, "-m", "tests.training.killed_fits", str(folder), str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"seed": seed}


def check(found: dict[str, Any], kills: int) -> None:
    for name, least in (("alone", kills), ("with workers", kills), ("writing", 5)):
        assert found[name]["differs"] == [], found["seed"]
        assert found[name]["kills"] >= least


def test_fit_that_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    check(report(tmp_path, kills=3), kills=3)


@pytest.mark.slow
def test_fit_that_is_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    check(report(tmp_path, kills=20), kills=20)
