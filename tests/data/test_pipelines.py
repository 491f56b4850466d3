"""What the model sees: augmentation in HU, reproducible, and gentle enough that the finding stays in the picture."""

import numpy as np
import pytest
import torch
from ct_builder import GRIDS, Grid, phantom_hu
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.config import AugmentConfig
from medvit.data.pipelines import choose_slices, prediction_transform, prepare_slices, training_transform
from medvit.records import AIR_HU, ClaheSettings, Preprocessing, Scan

ONE = Preprocessing(windows=("lung",), size=64)
NONE = AugmentConfig(rotate_deg=0, shift=0, zoom=0, noise_hu=0, blur_px=0, window_jitter=0)


def square_pixels(affine):
    """The same axes, 1 mm in plane."""
    result = affine.copy()
    result[:3, :2] /= np.linalg.norm(affine[:3, :2], axis=0)
    return result


def scan_of(hu, affine=None):
    return Scan(hu=np.asarray(hu, np.float32), affine=square_pixels(Grid().affine if affine is None else affine))


def plain(preprocessing, augment=None):
    channels = len(preprocessing.windows)
    return training_transform(preprocessing, augment, [0.0] * channels, [1.0] * channels)


def run(transform, slices, seed=0):
    transform.set_random_state(seed=seed)
    return torch.as_tensor(transform(np.array(slices, np.float32))).as_subclass(torch.Tensor)


def body(slices=3, size=64):
    """Air with a water disc, and a dense 8 px lesion off its centre."""
    y, x = np.indices((size, size))
    hu = np.full((slices, size, size), -1000.0, np.float32)
    hu[:, (y - size / 2) ** 2 + (x - size / 2) ** 2 < (0.4 * size) ** 2] = 0
    hu[:, 24:32, 36:44] = 3000
    return hu


# ---- prepare_slices -------------------------------------------------------------------------------------------------


def test_prepared_slices_are_square_int16_in_hu():
    slices = prepare_slices(scan_of(phantom_hu()), Preprocessing(size=24))
    assert (slices.shape, slices.dtype) == ((12, 24, 24), np.int16)
    np.testing.assert_array_equal(slices[:, 2:22], phantom_hu())


def test_padding_to_a_square_is_air_not_water():
    slices = prepare_slices(scan_of(phantom_hu()), Preprocessing(size=24))
    assert (slices[:, [0, 1, 22, 23]] == AIR_HU).all()


def test_shapes_are_kept_where_pixels_are_not_square():
    """A disc in mm stays a disc: rows 2 mm apart, columns 1 mm."""
    y, x = np.indices((40, 80))
    hu = np.where((2 * y - 40) ** 2 + (x - 40) ** 2 < 20**2, 100, -1000)[None]
    affine = np.diag([1.0, 2.0, 5.0, 1.0])
    (plane,) = prepare_slices(Scan(hu=hu.astype(np.float32), affine=affine), Preprocessing(size=80))
    disc = plane > -450
    assert abs(int(disc.any(axis=0).sum()) - 40) <= 2
    assert abs(int(disc.any(axis=1).sum()) - 40) <= 2


@pytest.mark.parametrize("name", ["axial", "prone", "head_last"])
def test_table_position_does_not_show(name):
    """Prone, supine and caudal first look alike when oriented, and differ as stored."""
    grid = GRIDS[name]
    upright = prepare_slices(scan_of(phantom_hu(), grid.affine), Preprocessing(size=24))
    flips = {"axial": (), "prone": (1, 2), "head_last": (0,)}[name]
    np.testing.assert_array_equal(upright[:, 2:22], np.flip(phantom_hu(), flips))
    stored = Preprocessing(size=24, orientation="as_stored")
    np.testing.assert_array_equal(prepare_slices(scan_of(phantom_hu(), grid.affine), stored)[:, 2:22], phantom_hu())


@pytest.mark.parametrize("size", [16, 24, 60])
def test_resizing_keeps_the_mean(size):
    hu = np.random.default_rng(0).integers(-1000, 1000, (2, 48, 48))
    hu[1] = -10
    slices = prepare_slices(scan_of(hu), Preprocessing(size=size))
    assert slices[0].mean() == pytest.approx(hu[0].mean(), abs=20)
    assert (slices[1] == -10).all()


# ---- choose_slices --------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(count=st.integers(1, 400), wanted=st.integers(1, 64), seed=st.none() | st.integers(0, 1000))
def test_chosen_slices_are_sorted_unique_in_range_and_spread(count, wanted, seed):
    rng = None if seed is None else np.random.RandomState(seed)
    chosen = choose_slices(count, wanted, rng)
    assert len(chosen) == min(count, wanted)
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < count
    if count > wanted:
        edges = np.linspace(0, count, wanted + 1)
        assert (chosen >= np.floor(edges[:-1])).all()
        assert (chosen <= np.ceil(edges[1:]) - 1).all()


def test_training_draws_differ_and_reach_every_slice():
    rng = np.random.RandomState(0)
    drawn = [tuple(choose_slices(20, 8, rng)) for _ in range(200)]
    assert len(set(drawn)) > 100
    assert {index for draw in drawn for index in draw} == set(range(20))


def test_prediction_takes_the_middle_of_each_stretch():
    assert choose_slices(9, 3).tolist() == [1, 4, 7]


# ---- prediction -----------------------------------------------------------------------------------------------------


def test_prediction_is_deterministic_and_normalised_per_channel():
    preprocessing = Preprocessing(windows=("lung", "bone"), size=64)
    transform = prediction_transform(preprocessing, [0.5, 0.25], [0.5, 0.2])
    one, two = run(transform, body(), seed=1), run(transform, body(), seed=2)
    assert torch.equal(one, two)
    assert (one.shape, one.dtype) == ((3, 2, 64, 64), torch.float32)
    water = one[0, :, 50, 32]
    expected = [((0 + 600) / 1500 + 0.5 - 0.5) / 0.5, ((0 - 500) / 1800 + 0.5 - 0.25) / 0.2]
    np.testing.assert_allclose(water, expected, atol=1e-5)


def test_no_augmentation_is_the_prediction_transform():
    preprocessing = Preprocessing(size=64, clahe=ClaheSettings())
    means, stds = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    expected = run(prediction_transform(preprocessing, means, stds), body())
    assert torch.equal(run(training_transform(preprocessing, None, means, stds), body()), expected)


def test_all_parts_at_zero_change_nothing():
    expected = run(plain(ONE), body())
    torch.testing.assert_close(run(plain(ONE, NONE), body(), seed=3), expected, atol=1e-4, rtol=0)


def test_clahe_setting_is_applied_per_slice():
    with_clahe = run(plain(ONE.model_copy(update={"clahe": ClaheSettings(clip_limit=60)})), body())
    assert not torch.equal(with_clahe, run(plain(ONE), body()))
    assert torch.equal(with_clahe[0], with_clahe[2])  # equal slices stay equal


# ---- augmentation ---------------------------------------------------------------------------------------------------

FULL = AugmentConfig(flip=True)


def test_augmentation_depends_on_the_seed_only():
    transform = plain(ONE, FULL)
    first = [run(transform, body(), seed) for seed in (1, 2, 3)]
    again = [run(transform, body(), seed) for seed in (3, 1, 2)]
    fresh = run(plain(ONE, FULL), body(), 2)
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[2])
    assert torch.equal(first[2], again[0])
    assert torch.equal(first[1], fresh)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("seed", range(20))
def test_values_stay_inside_the_windows(seed):
    result = run(plain(Preprocessing(size=64), FULL), body(), seed)
    assert torch.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("seed", range(20))
def test_borders_are_never_filled_with_water(seed):
    """Zeros around a moved picture are water in HU: a phantom patient at its edge."""
    air = np.full((2, 64, 64), -1000.0, np.float32)
    moves = AugmentConfig(noise_hu=0, blur_px=0, window_jitter=0, shift=0.3, rotate_deg=45, zoom=0.5)
    result = run(plain(ONE, moves), air, seed)
    assert result.max() < 0.3  # air is 0.23 in the lung window, water 0.9


@pytest.mark.parametrize("seed", range(40))
def test_the_finding_is_never_cropped_away(seed):
    """Default strength moves a lesion; it does not cut it out."""
    bone = Preprocessing(windows=((1500, 1000),), size=64)  # only the lesion is above 0
    before = float(run(plain(bone), body()).sum())
    after = float(run(plain(bone, AugmentConfig(window_jitter=0)), body(), seed).sum())
    assert 0.7 * before < after < 1.45 * before


def test_one_draw_moves_all_slices_of_a_scan_alike():
    moves = AugmentConfig(noise_hu=0)
    result = run(plain(ONE, moves), body(), 5)
    torch.testing.assert_close(result[0], result[2])


def test_flips_are_off_unless_asked_for():
    """Anatomy has sides: without flips, a lesion on one side stays on it."""
    half = np.full((1, 64, 64), -1000.0, np.float32)
    half[:, :, 40:] = 1000
    still = AugmentConfig(rotate_deg=0, shift=0, zoom=0, noise_hu=0, blur_px=0, window_jitter=0)
    sides = {bool(run(plain(ONE, still), half, s)[..., 60].mean() > 0.5) for s in range(20)}
    flipped = {
        bool(run(plain(ONE, still.model_copy(update={"flip": True})), half, s)[..., 60].mean() > 0.5) for s in range(20)
    }
    assert (sides, flipped) == ({True}, {True, False})


def test_flips_never_turn_a_patient_upside_down():
    top = np.full((1, 64, 64), -1000.0, np.float32)
    top[:, :20] = 1000
    flips = NONE.model_copy(update={"flip": True})
    assert all(run(plain(ONE, flips), top, s)[..., 5, :].mean() > 0.5 for s in range(10))


def test_noise_is_added_in_hu_before_the_window():
    """15 HU are far more of a narrow window than of a wide one."""
    noise = NONE.model_copy(update={"noise_hu": 30.0})
    both = Preprocessing(windows=((0, 100), (0, 4000)), size=64)
    water = np.zeros((1, 64, 64), np.float32)
    spread = torch.stack([run(plain(both, noise), water, s).std(dim=(0, 2, 3)) for s in range(10)]).max(dim=0).values
    assert spread[0] / spread[1] > 20


def test_window_jitter_is_as_large_as_said_and_no_larger():
    jitter = NONE.model_copy(update={"window_jitter": 0.1})
    water = np.zeros((1, 64, 64), np.float32)
    soft = Preprocessing(windows=((0, 400),), size=64)
    values = [float(run(plain(soft, jitter), water, s).mean()) for s in range(60)]
    assert max(abs(value - 0.5) for value in values) <= 0.1 / 0.9 + 1e-6
    assert np.std(values) > 0.03
