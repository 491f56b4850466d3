import math
from itertools import combinations
from statistics import median_low
from typing import Any

import pytest
import torch
from monai.metrics import MMDMetric
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medvit.objectives.discrepancy import mmd2

KINDS = [("rbf", False), ("rbf", True), ("linear", False), ("linear", True)]


def samples(first: int = 5, second: int = 7, width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (first, second))
    return x, y + 0.8


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def median_pair(both: list[list[float]]) -> tuple[int, int]:
    distances = {(i, j): squared_distance(both[i], both[j]) for i, j in combinations(range(len(both)), 2)}
    middle = median_low(distances.values())
    return next(pair for pair, distance in distances.items() if distance == middle)


def by_double_loop(x: Tensor, y: Tensor, kernel: str, unbiased: bool) -> float:
    xs, ys = x.tolist(), y.tolist()
    first, second = median_pair(xs + ys)
    median = squared_distance((xs + ys)[first], (xs + ys)[second])

    def k(a: list[float], b: list[float]) -> float:
        if kernel == "linear":
            return sum(p * q for p, q in zip(a, b, strict=True))
        return (
            sum(math.exp(-squared_distance(a, b) / (2 * times * median)) for times in (1 / 8, 1 / 4, 1 / 2, 1, 2)) / 5
        )

    def mean(rows: list[list[float]], columns: list[list[float]], *, same: bool) -> float:
        values = [
            k(a, b) for i, a in enumerate(rows) for j, b in enumerate(columns) if not (same and unbiased and i == j)
        ]
        return sum(values) / len(values)

    return mean(xs, xs, same=True) + mean(ys, ys, same=True) - 2 * mean(xs, ys, same=False)


@pytest.mark.parametrize(("kernel", "unbiased"), KINDS)
def test_estimate_is_that_of_a_double_loop(kernel, unbiased):
    x, y = samples()
    expected = by_double_loop(x, y, kernel, unbiased)
    assert mmd2(x, y, kernel=kernel, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-9)
    assert mmd2(y, x, kernel=kernel, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-9)


def test_unbiased_linear_estimate_is_that_of_monai():
    x, y = samples(6, 6)
    theirs = MMDMetric()(x[:, :, None, None], y[:, :, None, None])
    torch.testing.assert_close(mmd2(x, y, kernel="linear", unbiased=True), theirs)


def test_gaussian_kernels_are_those_of_scikit_learn():
    x, y = samples()
    both = torch.cat([x, y])
    first, second = median_pair(both.tolist())
    median = float((both[first] - both[second]).square().sum())
    gram = sum(torch.from_numpy(rbf_kernel(both.numpy(), gamma=1 / (2 * 2.0**p * median))) for p in range(-3, 2)) / 5
    torch.testing.assert_close(mmd2(x, y), gram[:5, :5].mean() + gram[5:, 5:].mean() - 2 * gram[:5, 5:].mean())


def test_biased_linear_estimate_is_the_squared_distance_of_means():
    x, y = samples()
    torch.testing.assert_close(mmd2(x, y, kernel="linear"), (x.mean(dim=0) - y.mean(dim=0)).square().sum())


@pytest.mark.parametrize(("kernel", "unbiased"), KINDS)
def test_gradient_is_the_finite_difference(kernel, unbiased):
    x, y = samples()
    both = torch.cat([x, y]).requires_grad_()

    def estimate(rows: Tensor) -> Tensor:
        return mmd2(rows[:5], rows[5:], kernel=kernel, unbiased=unbiased)

    estimate(both).backward()
    # the median is held constant: moving one of its two cases would move it
    free = [row for row in range(12) if row not in median_pair(both.tolist())]
    for row in free:
        for column in range(3):
            step = torch.zeros_like(both)
            step[row, column] = 1e-6
            slope = (estimate(both.detach() + step) - estimate(both.detach() - step)) / 2e-6
            assert both.grad[row, column].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def test_bandwidth_follows_the_scale_of_the_features_and_has_no_gradient():
    x, y = samples()
    torch.testing.assert_close(mmd2(x, y), mmd2(1000 * x, 1000 * y))
    both = torch.cat([x, y]).requires_grad_()
    mmd2(both[:5], both[5:]).backward()
    # were it not constant, growing all features alike would change nothing, and this would be zero (Euler)
    assert abs((both * both.grad).sum()) > 1e-3


def test_wide_features_are_seen():
    # with sigma 1 every kernel of 768 features is exp(-768) = 0: no difference, no gradient
    torch.manual_seed(0)
    x, y, same = torch.randn(32, 768, requires_grad=True), torch.randn(32, 768) + 1, torch.randn(32, 768)
    assert torch.exp(-torch.cdist(x, y).square() / 2).max() == 0
    apart = mmd2(x, y)
    apart.backward()
    assert apart > 5 * mmd2(x, same)
    assert x.grad.norm() > 1e-3


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_no_tensor_of_differences_is_made(kernel):
    N = M = 40
    D = 500
    x, y = torch.randn(N, D, requires_grad=True), torch.randn(M, D)
    with LargestTensor() as largest:
        mmd2(x, y, kernel=kernel).backward()
    assert largest.elements <= max((N + M) * D, 5 * (N + M) ** 2) < N * M * D


def test_unbiased_estimate_is_below_zero_half_of_the_time_and_says_so():
    estimates = []
    for seed in range(200):
        torch.manual_seed(seed)
        estimates.append(mmd2(torch.randn(8, 4), torch.randn(8, 4), unbiased=True))
    values = torch.stack(estimates)
    assert 0.35 < (values < 0).float().mean() < 0.75
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert "below zero" in mmd2.__doc__


def test_biased_estimate_is_never_below_zero():
    for seed in range(50):
        torch.manual_seed(seed)
        x, y = torch.randn(8, 4), torch.randn(8, 4)
        assert mmd2(x, y) > 0
    assert mmd2(x, x).abs() < 1e-6


@pytest.mark.parametrize(("sizes", "unbiased"), [((0, 3), False), ((3, 0), False), ((1, 3), True), ((3, 1), True)])
def test_samples_too_small_for_an_estimate_are_refused(sizes, unbiased):
    with pytest.raises(ValueError, match="no unbiased estimate" if unbiased else "no biased estimate"):
        mmd2(torch.randn(sizes[0], 2), torch.randn(sizes[1], 2), unbiased=unbiased)


def test_cases_that_are_all_alike_differ_in_nothing():
    x = torch.ones(3, 4, requires_grad=True)
    distance = mmd2(x, torch.ones(2, 4))
    distance.backward()
    assert distance == 0
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_16_bit_training_computes_it_in_32(kernel):
    torch.manual_seed(0)
    x, y = torch.randn(8, 64) + 10, torch.randn(8, 64) + 10.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mmd2(x, y, kernel=kernel)
    torch.testing.assert_close(mixed.double(), mmd2(x.double(), y.double(), kernel=kernel), rtol=1e-3, atol=1e-4)
