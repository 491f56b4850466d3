"""The same results wherever the work is done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvit.deployment import predict_folder
from tests.deployment.batches import NOON, make_model, outputs, write_export

ROOT = Path(__file__).parents[2]


def test_a_ray_of_two_workers_gives_what_one_process_gives(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install medvit[ray]")
    write_export(tmp_path / "export", 12, bad=0.25)
    predict_folder(tmp_path / "export", make_model(), tmp_path / "here", clock=lambda: NOON)
    command = [sys.executable, "-W", "ignore", "-m", "tests.deployment.ray_batch"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(
        [*command, tmp_path / "export", tmp_path / "ray"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "here")
