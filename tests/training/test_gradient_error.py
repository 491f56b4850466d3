"""Bias, variance and cost of compressed gradients, against what is known in closed form."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from medvit.config import AccelerationConfig
from medvit.models.compression import NONE, Compression
from medvit.objectives.acceleration import check_relaxing
from medvit.training.gradient_chart import PANELS, draw_errors
from medvit.training.gradient_error import (
    GradientError,
    Projection,
    cosine,
    derive_schedule,
    squared_bias,
    squared_bias_error,
    total_variance,
)

HALF, QUARTER, LARGE = Compression(0.5), Compression(0.25), Compression(patch=16)


def quadratic(rng: np.random.Generator, steps: int, shrink: float, extra: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradients w - x of 0.5 * (w - x)^2 at w = 0, exact and compressed, where compression sees shrink * x + noise."""
    x = rng.normal(1.0, 0.8, size=(steps, 30))
    return -x, -(shrink * x + extra * rng.normal(size=x.shape))


def test_bias_and_variance_of_a_quadratic_are_what_algebra_says():
    exact, rough = quadratic(np.random.default_rng(0), 40_000, shrink=0.7, extra=0.5)
    assert squared_bias(rough - exact) == pytest.approx(30 * 0.3**2, rel=0.01)
    assert total_variance(exact) == pytest.approx(30 * 0.8**2, rel=0.01)
    assert total_variance(rough) == pytest.approx(30 * (0.7**2 * 0.8**2 + 0.5**2), rel=0.01)
    assert squared_bias(exact - exact) == 0


def test_halves_are_right_on_average_where_the_naive_square_is_not():
    """A handful of steps is enough on average; ||mean difference||² is too large by variance / J for everything."""
    rng, J, repetitions = np.random.default_rng(1), 6, 4000
    halves, naive = [], []
    for _ in range(repetitions):
        exact, rough = quadratic(rng, J, shrink=0.9, extra=0.5)
        halves.append(squared_bias(rough - exact))
        naive.append(float(((rough - exact).mean(axis=0) ** 2).sum()))
    truth, scatter = 30 * 0.1**2, 30 * (0.1**2 * 0.8**2 + 0.5**2)
    error = np.std(halves) / repetitions**0.5
    assert np.mean(halves) == pytest.approx(truth, abs=4 * error)
    assert np.mean(naive) == pytest.approx(truth + scatter / J, abs=4 * error)
    assert np.mean(naive) > 3 * truth
    assert min(halves) < 0  # the price of being right on average


def test_it_is_the_mean_over_all_ways_of_halving():
    differences = np.random.default_rng(2).normal(size=(6, 4))
    products = []
    for half in combinations(range(6), 3):
        other = [step for step in range(6) if step not in half]
        products.append(differences[list(half)].mean(axis=0) @ differences[other].mean(axis=0))
    assert squared_bias(differences) == pytest.approx(np.mean(products))


def test_the_standard_error_is_the_scatter_of_repetitions():
    rng, found = np.random.default_rng(3), []
    for _ in range(1500):
        exact, rough = quadratic(rng, 12, shrink=0.7, extra=0.5)
        found.append((squared_bias(rough - exact), squared_bias_error(rough - exact)))
    estimates, errors_told = np.array(found).T
    assert np.sqrt((errors_told**2).mean()) == pytest.approx(estimates.std(), rel=0.15)
    assert np.isnan(squared_bias_error(np.ones((2, 3))))


def test_one_step_has_no_halves():
    with pytest.raises(ValueError, match="two independent steps"):
        squared_bias(np.ones((1, 3)))


def test_cosine_of_nothing_is_undefined():
    assert np.isnan(cosine(np.zeros(3), np.ones(3)))
    assert cosine(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(0.5**0.5)


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 50, generator=generator), torch.randn(77, generator=generator)]


def test_small_gradients_are_not_projected():
    flat = torch.cat([one.flatten() for one in tensors(0)]).double().numpy()
    assert np.array_equal(Projection(3000)(tensors(0)), flat)


def test_projection_keeps_norms_and_products_on_average():
    first, second = tensors(0), tensors(1)
    flat = [torch.cat([one.flatten() for one in given]).double().numpy() for given in (first, second)]
    squares, products = [], []
    for seed in range(300):
        project = Projection(256, seed=seed, piece=500)
        own, other = project(first), project(second)
        assert len(own) == 256
        squares.append(own @ own)
        products.append(own @ other)
    for found, exact in ((squares, flat[0] @ flat[0]), (products, flat[0] @ flat[1])):
        assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / 300**0.5)
    # relative scatter of a squared norm: sqrt(2 / M)
    assert np.std(squares) / np.mean(squares) == pytest.approx((2 / 256) ** 0.5, rel=0.2)


def test_projection_is_fixed_and_linear():
    first, second = tensors(0), tensors(1)
    project = Projection(256, piece=500)
    total = project([2 * one - other for one, other in zip(first, second, strict=True)])
    np.testing.assert_allclose(total, 2 * project(first) - project(second), atol=1e-4)
    assert not np.allclose(total, Projection(256, seed=1)([2 * a - b for a, b in zip(first, second, strict=True)]))


def errors(progress: float, *given: tuple[Compression, float, float, float, float]) -> list[GradientError]:
    """(compression, tokens share, bias², variance, cost)."""
    return [
        GradientError(progress, one, share, bias2, variance, cost, cosine=1.0, steps=8)
        for one, share, bias2, variance, cost in [(NONE, 1.0, 0.0, 10.0, 1.0), *given]
    ]


EARLY = errors(0.0, (HALF, 0.5, 0.1, 11.0, 0.5), (QUARTER, 0.25, 0.2, 12.0, 0.3))
MIDDLE = errors(0.5, (HALF, 0.5, 2.0, 11.0, 0.5), (QUARTER, 0.25, 9.0, 12.0, 0.3))
LATE = errors(1.0, (HALF, 0.5, 20.0, 11.0, 0.5), (QUARTER, 0.25, 90.0, 12.0, 0.3))


def as_rows(schedule: tuple) -> list[tuple[float, float, int | None]]:
    return [(step.from_progress, step.keep, step.patch) for step in schedule]


def test_each_point_takes_what_costs_least_and_the_end_is_whole():
    schedule = derive_schedule([*LATE, *EARLY, *MIDDLE])
    assert as_rows(schedule) == [(0.0, 0.25, None), (0.25, 0.5, None), (0.75, 1.0, None)]
    AccelerationConfig(schedule=schedule)
    check_relaxing(schedule, own=8)


def test_the_last_part_is_whole_even_where_compression_seems_to_pay():
    everywhere = [replace(error, progress=at) for at in (0.0, 0.25, 0.5, 0.75, 1.0) for error in EARLY]
    assert as_rows(derive_schedule(everywhere)) == [(0.0, 0.25, None), (0.85, 1.0, None)]


def test_tokens_never_become_fewer_and_one_outlier_does_not_decide_for_all():
    noisy = errors(0.0, (HALF, 0.5, 6.0, 11.0, 0.5), (QUARTER, 0.25, 8.0, 12.0, 0.3))  # nothing pays at the start
    rest = [replace(error, progress=at) for at in (0.25, 0.5, 0.75) for error in EARLY]
    schedule = derive_schedule([*noisy, *rest])
    assert as_rows(schedule) == [(0.0, 0.25, None), (0.85, 1.0, None)]


def test_costs_decide_and_not_the_number_of_steps():
    """At equal steps nothing beats the uncompressed gradient; what counts is what is had at equal compute."""
    at_equal_steps = {error.compression: error.bias2 + error.variance for error in EARLY}
    assert min(at_equal_steps, key=at_equal_steps.__getitem__) == NONE
    assert as_rows(derive_schedule(EARLY))[0] == (0.0, 0.25, None)
    as_dear = [replace(error, cost=1.0) for error in EARLY]  # tokens are saved, and no time
    assert as_rows(derive_schedule(as_dear)) == [(0.0, 1.0, None)]


def test_no_compression_at_all_is_a_schedule_too():
    schedule = derive_schedule(LATE)
    assert as_rows(schedule) == [(0.0, 1.0, None)]
    AccelerationConfig(schedule=schedule)


@pytest.mark.parametrize("first", ["kept", "patches"])
def test_equal_shares_may_follow_each_other_in_either_order(first):
    """A quarter of the tokens, and patches twice as large, cost as many: whichever is better early may come early."""
    kept, patches = QUARTER, Compression(patch=16)
    early, late = (kept, patches) if first == "kept" else (patches, kept)
    points = [
        errors(at, *((one, 0.25, 0.0, 10.0, 0.3 if one == better else 0.9) for one in (kept, patches)))
        for at, better in ((0.0, early), (0.5, late))
    ]
    schedule = derive_schedule([*points[0], *points[1]])
    assert [Compression(step.keep, step.patch) for step in schedule] == [early, late, NONE]


def test_slices_are_whole_before_the_backbone_ends_to_learn():
    everywhere = [replace(error, progress=at) for at in (0.0, 0.25, 0.5, 0.75) for error in EARLY]
    assert as_rows(derive_schedule(everywhere, until=0.8)) == [(0.0, 0.25, None), (pytest.approx(0.68), 1.0, None)]


def test_points_with_large_gradients_do_not_outweigh_others():
    large = [replace(error, bias2=1e6 * error.bias2, variance=1e6 * error.variance, progress=0.2) for error in EARLY]
    assert derive_schedule([*EARLY, *large]) == derive_schedule(EARLY)


def test_a_table_with_holes_is_refused():
    with pytest.raises(ValueError, match="missing"):
        derive_schedule([*EARLY, *MIDDLE[:2]])
    with pytest.raises(ValueError, match="missing"):
        derive_schedule(EARLY[1:])


def test_picture_shows_every_point_of_the_table_in_units_of_its_own_error(tmp_path):
    with_patches = [
        replace(error, compression=LARGE) if error.compression == QUARTER else error
        for error in (*EARLY, *MIDDLE, *LATE)
    ]
    figure = draw_errors(with_patches)
    assert [panel.get_title() for panel in figure.axes] == list(PANELS)
    first = figure.axes[0]
    drawn = {(round(x, 6), round(y, 6)) for line in first.lines for x, y in zip(*line.get_data(), strict=True)}
    for error in with_patches:
        assert (error.tokens_share, round(error.ca_mse / 10.0, 6)) in drawn
    assert [panel.get_yscale() for panel in figure.axes] == ["symlog", "symlog", "linear"]  # a bias of nine times
    figure.savefig(tmp_path / "errors.png")
