import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvit.config import TtaConfig
from medvit.data.views import AS_IT_IS, View, draw_views, look, rewindowed
from medvit.records import AIR_HU, resolve_window

STILL = TtaConfig(scale=(1, 1), crop=False, shift=0, rotate_deg=0, window_jitter=0)


def disc(size=64, at=(32, 20), radius=6):
    """A bright disc in air, (1, size, size), centre (row, column)."""
    rows, columns = np.mgrid[:size, :size]
    inside = (rows - at[0]) ** 2 + (columns - at[1]) ** 2 <= radius**2
    return np.where(inside, 500, AIR_HU).astype(np.float32)[None]


def centre(image):
    """Row and column of what is brighter than air."""
    weight = image[0] - AIR_HU
    return [float((weight * grid).sum() / weight.sum()) for grid in np.mgrid[: image.shape[1], : image.shape[2]]]


def test_the_first_view_is_the_slices_as_they_are():
    slices = disc()
    assert look(slices, AS_IT_IS) is slices
    assert draw_views(TtaConfig(), 126, 14)[0] == AS_IT_IS
    assert draw_views(None, 126, 14) == (AS_IT_IS,)


@given(st.integers(0, 1000), st.sampled_from([(126, 14), (64, 8), (224, 16)]))
def test_views_stay_within_what_was_asked(seed, sizes):
    size, patch = sizes
    config = TtaConfig(views=9, scale=(0.8, 1.2), seed=seed)
    views = draw_views(config, size, patch)
    assert len(views) == 9
    assert draw_views(config, size, patch) == views
    for view in views:
        assert (view.zoom * size / patch) == pytest.approx(round(view.zoom * size / patch))
        assert 0.8 - patch / size <= view.zoom <= 1.2 + patch / size
        room = max(0, view.zoom - 1) / 2
        assert max(abs(view.right), abs(view.down)) <= room + config.shift
        assert abs(view.degrees) <= 5
        assert abs(view.level) <= 0.03
        assert not view.flip


def test_crops_are_not_all_the_middle():
    views = draw_views(TtaConfig(views=30, scale=(1.2, 1.2), shift=0), 128, 16)[1:]
    assert np.std([view.right for view in views]) > 0.03
    middle = draw_views(TtaConfig(views=30, scale=(1.2, 1.2), shift=0, crop=False), 128, 16)[1:]
    assert {(view.right, view.down) for view in middle} == {(0, 0)}


def test_flips_only_where_they_are_allowed():
    assert any(view.flip for view in draw_views(TtaConfig(views=20, flip=True), 64, 8))
    row, column = centre(look(disc(), View(flip=True)))
    assert (row, column) == pytest.approx((32, 43), abs=0.01)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View(right=0.125), (32, 28)),
        (View(down=-0.125), (24, 20)),
        (View(zoom=1.5), (31.5 + 0.5 * 1.5, 31.5 - 11.5 * 1.5)),
        (View(degrees=90), (31.5 + 11.5, 31.5 + 0.5)),  # counter-clockwise: from the left to below
    ],
)
def test_pictures_move_as_the_view_says(view, expected):
    assert centre(look(disc(), view)) == pytest.approx(expected, abs=0.15)


def test_what_comes_in_from_outside_is_air():
    moved = look(np.zeros((1, 32, 32), np.float32), View(right=0.25))
    assert set(moved[0, :, :8].ravel()) == {AIR_HU}


def test_windows_move_by_shares_of_their_width():
    assert rewindowed(("lung",), AS_IT_IS) == ("lung",)
    ((level, width),) = rewindowed(("lung",), View(level=0.1, stretch=1.2))
    before = resolve_window("lung")
    assert (level, width) == pytest.approx((before[0] + 0.1 * before[1], 1.2 * before[1]))


def test_ranges_of_nothing_give_the_same_view_again():
    assert set(draw_views(STILL, 126, 14)) == {AS_IT_IS}
