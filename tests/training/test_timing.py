"""What --dry-run tells of the time of a step."""

import itertools

import pytest

from medvit.config import Stage
from medvit.training import timing
from tests.training.fits import make_dataset, make_objective


@pytest.mark.parametrize(("batch_size", "expected"), [(4, 4), (100, 6)])
def test_a_step_is_one_of_the_stage_at_its_dearest_after_one_to_warm_up(batch_size, expected, monkeypatch):
    objective, seen = make_objective().eval(), []
    objective.register_forward_pre_hook(
        lambda module, given: seen.append((len(given[0]["index"]), given[1], module.training))
    )
    ticks = iter(itertools.accumulate([0, 99, 0, 2]))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    took = timing.time_step(objective, make_dataset(6), Stage(trainable="head"), batch_size)
    assert took == 2
    # at a progress of 1 an accelerated objective sees whole slices
    assert seen == [(expected, 1.0, True)] * 2
    assert not any(parameter.requires_grad for parameter in objective.classifier.backbone.parameters())
