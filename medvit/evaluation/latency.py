"""How long a prediction takes on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from medvit.evaluation.decision import Latency
from medvit.inference import Judged

TIMED = 10
"""Cases whose prediction is timed, after one to warm up."""


def measure_latency(judged: Sequence[Judged]) -> Latency:
    """Predict a few cases again, one by one, and take the time.

    Raises:
        ValueError: no case.
    """
    if not judged:
        raise ValueError("latency is measured on cases: there is none")
    some, seconds = judged[:TIMED], []
    for one in (some[0], *some):
        slices = one.load(one.case)
        began = time.perf_counter()
        one.model.encoder.study(slices)
        seconds.append(time.perf_counter() - began)
    device = next(some[0].model.encoder.classifier.parameters()).device
    return Latency(
        median=float(np.median(seconds[1:])),
        slowest=max(seconds[1:]),
        cases=len(some),
        slices=float(np.mean([len(one.prediction.slice_weights) for one in some])),
        device=str(device),
        threads=torch.get_num_threads(),
    )
