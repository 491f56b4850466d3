"""Two processes that share a batch do what one does with all of it."""

from pathlib import Path

import one_step
import pytest
import torch
from torch import Tensor, multiprocessing

from medvit.objectives.gathering import gather_rows, processes, sum_over_processes


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, tuple[dict[str, Tensor], float]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(one_step.step_together, args=(2, str(folder)), nprocs=2)
    return {name: torch.load(folder / f"{name}.pt") for name in one_step.SETTINGS}


@pytest.mark.parametrize("name", one_step.SETTINGS)
def test_gradient_of_two_processes_is_that_of_the_global_batch(together, name):
    (ours, our_loss), (expected, expected_loss) = together[name], one_step.step_alone(name)
    assert our_loss == pytest.approx(expected_loss, rel=1e-6)
    assert ours.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for parameter, gradient in expected.items():
        # some gradients are zero but for rounding: a bias before a softmax
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-5, atol=1e-9 * float(largest), msg=parameter)


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2, requires_grad=True)
    assert processes() == 1
    assert gather_rows(rows) is rows
    assert torch.equal(sum_over_processes(rows), rows.detach())
