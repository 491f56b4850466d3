"""What is known of noise, kernels, drift, metal and motion, on disks of water in air."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.evaluation.physics import CORRUPTIONS, METAL_DISTANCE, corrupt, draws, lower_dose
from medvit.records import AIR_HU

SIDE = 64
ROW, COLUMN = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
RADIUS = np.hypot(ROW, COLUMN)
WATER = np.where(RADIUS < 26, 0, -1000).astype(np.int16)[None]
BODY = RADIUS < 25


def spoil(name: str, slices: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    return corrupt(name, slices, severity, draws(seed, "case"), ["lung", "soft_tissue"]).astype(float)


def change(name: str, slices: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    return spoil(name, slices, severity, seed) - slices


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**31))
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_zero_changes_nothing(name, seed):
    anything = np.random.default_rng(seed).integers(-2000, 8000, (3, 16, 16)).astype(np.int16)
    assert (spoil(name, anything, 0, seed) == anything).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_changes_the_picture_and_more_so_when_stronger(name):
    slices = np.maximum(np.random.default_rng(1).normal(0, 30, (9, SIDE, SIDE)) + WATER, AIR_HU).astype(np.int16)
    strengths = [s for s in CORRUPTIONS[name].severities if s > 0]
    moved = [np.abs(change(name, slices, severity)).mean() for severity in strengths]
    assert moved[0] > 0
    assert moved == sorted(moved)
    assert spoil(name, slices, strengths[-1]).min() >= AIR_HU


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_depend_on_seed_and_case_only(name):
    slices, strongest = np.tile(WATER, (2, 1, 1)), CORRUPTIONS[name].severities[-1]
    first = corrupt(name, slices, strongest, draws(0, "case"), ["brain"])
    np.random.seed(5)  # noqa: NPY002 - the global state, which must not matter
    assert (corrupt(name, slices, strongest, draws(0, "case"), ["brain"]) == first).all()
    if name in ("dose", "metal", "motion", "white"):
        assert (corrupt(name, slices, strongest, draws(0, "another"), ["brain"]) != first).any()
        assert (corrupt(name, slices, strongest, draws(1, "case"), ["brain"]) != first).any()


# ---- dose -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Of 20 HU on a disk of water, (slices, H, H): equal slices, so that all of it is noise."""
    return change("dose", np.tile(WATER, (40, 1, 1)), 20)


@pytest.mark.parametrize("severity", [10, 40])
def test_noise_is_as_strong_as_said(severity):
    spread = change("dose", np.tile(WATER, (20, 1, 1)), severity).std(axis=0)
    assert spread[BODY].mean() == pytest.approx(severity, rel=0.1)


def test_noise_is_larger_in_the_middle(noise):
    spread = noise.std(axis=0)
    assert spread[RADIUS < 8].mean() > 1.3 * spread[(RADIUS > 20) & (RADIUS < 25)].mean()


def power(noise: np.ndarray) -> np.ndarray:
    """Mean power (16,) by radial frequency from 0 to Nyquist, of the middle of the disk."""
    middle = noise[:, 16:48, 16:48] * np.hanning(32)[:, None] * np.hanning(32)
    spectrum = (np.abs(np.fft.fft2(middle)) ** 2).mean(axis=0)
    radial = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)) * 32
    return np.array([spectrum[(radial >= k) & (radial < k + 1)].mean() for k in range(16)])


def test_noise_power_rises_from_zero_as_a_ramp(noise):
    found, white = power(noise), power(change("white", np.tile(WATER, (40, 1, 1)), 0.05))
    assert found[0] < 0.4 * found[4]  # the taper lets some of the next frequencies in
    assert (np.diff(found[:5]) > 0).all()
    assert white.max() < 1.4 * white.min()


def test_noise_is_streaked_along_the_longest_path():
    ellipse = np.where((COLUMN / 30) ** 2 + (ROW / 13) ** 2 < 1, 0, -1000).astype(np.int16)
    middle = change("dose", np.tile(ellipse, (40, 1, 1)), 20)[:, 24:40, 16:48]
    along = np.mean(middle[:, :, 1:] * middle[:, :, :-1]) / np.mean(middle**2)
    across = np.mean(middle[:, 1:] * middle[:, :-1]) / np.mean(middle**2)
    assert along > across + 0.2


def test_air_without_a_body_stays_as_it_is():
    air = np.full((1, 16, 16), -1000, np.float32)
    assert (lower_dose(air, 40.0, draws(0, "case")) == air).all()


# ---- kernel, drift, thickness ---------------------------------------------------------------------------------------


def test_kernels_keep_the_mean_and_move_the_edge():
    def steepest(slices: np.ndarray) -> float:
        return np.abs(np.diff(slices[0, SIDE // 2].astype(float))).max()

    for name, sign in (("softer", -1), ("sharper", 1)):
        spoilt = spoil(name, WATER, 1)
        assert sign * (steepest(spoilt) - steepest(WATER)) > 200
        assert spoilt[0][RADIUS < 20].mean() == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("offset", [-50, 10])
def test_drift_moves_tissue_and_leaves_air(offset):
    tissue = np.array([[[-1024, -1000, -900, -850], [-100, 0, 40, 1000]]], np.int16)
    assert change("drift", tissue, offset).tolist() == [[[0, 0, offset, offset], [offset] * 4]]


def test_thicker_slices_are_means_of_neighbours():
    stack = np.zeros((7, 2, 2), np.int16)
    stack[3], stack[0] = 300, 60
    assert spoil("thicker", stack, 3)[:, 0, 0].tolist() == [40, 20, 100, 100, 100, 0, 0]  # the first one counts twice


def test_white_noise_is_a_share_of_the_narrowest_window():
    flat = np.zeros((4, SIDE, SIDE), np.int16)
    found = corrupt("white", flat, 0.2, draws(0, "case"), ["lung", "brain", "bone"])
    assert found.std() == pytest.approx(0.2 * 120, rel=0.03)


# ---- metal and motion -----------------------------------------------------------------------------------------------


def between_and_beside(slices: np.ndarray) -> tuple[float, float]:
    """Mean change half-way between the two inserts, and as far from the middle at right angles to them."""
    moved = change("metal", slices, 4)
    row, column = np.nonzero(moved[0] > 2000)
    axis = np.linalg.eigh(np.cov(np.stack([column - column.mean(), row - row.mean()])))[1][:, -1]
    along, aside = COLUMN * axis[0] + ROW * axis[1], COLUMN * axis[1] - ROW * axis[0]
    reach = METAL_DISTANCE * SIDE
    between = (np.abs(along) < reach / 4) & (np.abs(aside) < 1.5)
    beside = (np.abs(along) < 1.5) & (np.abs(np.abs(aside) - reach) < reach / 4)
    return moved[0][between].mean(), moved[0][beside].mean()


def test_it_is_dark_between_the_inserts():
    between, beside = between_and_beside(WATER)
    assert between < -50
    assert between < beside - 50


def test_streaks_and_inserts_vanish_with_their_size():
    sizes = (0, 0.25, 0.5, 1, 2, 4)
    darkest = [-change("metal", WATER, size)[0][RADIUS < 3].mean() for size in sizes]
    assert darkest[0] == 0
    assert darkest[1] < 2
    assert darkest == sorted(darkest)


def test_motion_ghosts_the_edge_and_keeps_what_is_uniform():
    moved = np.abs(change("motion", WATER, 4)[0])
    assert moved[np.abs(RADIUS - 26) < 3].mean() > 100
    assert moved[RADIUS < 15].mean() < 30


def test_motion_is_half_of_each():
    # half of the angles see nothing of a shift along their rays, half see the disk where it went
    moved = spoil("motion", WATER, 4)[0] + 1000
    mass = np.maximum(moved, 0)
    shift = np.hypot((mass * COLUMN).sum(), (mass * ROW).sum()) / mass.sum()
    assert 0.2 * 0.04 * SIDE < shift < 0.04 * SIDE
