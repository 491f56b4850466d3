"""A batch on a Ray of two local workers, in a process of its own: `python -m tests.deployment.ray_batch EXPORT OUT`."""

import sys
from pathlib import Path

import ray

from medvit.deployment import BatchOptions, predict_folder
from tests.deployment.batches import NOON, make_model

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    predict_folder(Path(sys.argv[1]), make_model(), Path(sys.argv[2]), BatchOptions(engine="ray"), clock=lambda: NOON)
