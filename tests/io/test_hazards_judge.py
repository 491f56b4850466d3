"""The judge of the hazards sees what is wrong: else every test that relies on it proves nothing."""

from dataclasses import replace

import numpy as np
import pytest
from ct_builder import GRIDS, Ct, Grid, phantom_hu, world_points
from hazard_cases import C, Expected, Truth, assert_never_silently_wrong, misfit, refused, right, voxels_at

from medvit.records import AIR_HU, Scan


def scan_of(hu=None, grid=None, codes=()):
    hu = phantom_hu() if hu is None else hu
    return Scan(hu=hu.astype(np.float32), affine=(grid or Grid()).affine, codes=codes)


def one_voxel_wrong(hu):
    hu[3, 4, 5] += 2
    return hu


WRONG = {
    "flipped left to right": scan_of(phantom_hu()[:, :, ::-1]),
    "flipped head to feet": scan_of(phantom_hu()[::-1]),
    "one slice less": scan_of(phantom_hu()[:-1]),
    "one slice twice": scan_of(phantom_hu()[[0, 0, *range(2, 12)]]),
    "one voxel 2 HU off": scan_of(one_voxel_wrong(phantom_hu())),
    "0.3 mm off": scan_of(grid=Grid().moved(0, 0.3, 0)),
    "spacing a hundredth off": scan_of(grid=Grid(step=(0, 0, 2.525))),
    "the flag of another fault": scan_of(codes=(C.MONO1,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_volume_is_seen(name):
    assert misfit(WRONG[name], Truth(Grid()))


def test_the_right_volume_passes_in_any_order_of_voxels():
    affine = Grid().affine
    affine[:3, 3] += affine[:3, 2] * 11
    affine[:3, 2] *= -1
    turned = Scan(hu=phantom_hu()[::-1].astype(np.float32), affine=affine)
    assert misfit(turned, Truth(Grid())) == ""
    assert misfit(scan_of(), Truth(Grid(), codes=frozenset({C.MONO1})))  # a flag is missing


def straightened(grid, room=1.0):
    """The phantom of a tilted grid on a straight one, by the phantom's formula instead of interpolation."""
    steps = grid.affine[:3, 2]
    along = steps @ grid.normal
    drift = np.array([steps @ grid.row / 0.9, steps @ grid.column / 0.7]) * 11  # of the last slice, in pixels
    low = np.floor(np.minimum(drift, 0) * room).astype(int)
    high = np.ceil(np.maximum(drift, 0) * room).astype(int)
    affine = grid.affine
    affine[:3, 2] = grid.normal * along
    affine[:3, 3] += affine[:3, :2] @ low
    shape = (12, 20 + high[1] - low[1], 24 + high[0] - low[0])
    place = voxels_at(world_points(affine, shape), grid)
    inside = ((place[..., :2] >= 0) & (place[..., :2] <= (23, 19))).all(axis=-1)
    hu = np.where(inside, -1000 + place @ (11, 3, 40), AIR_HU).astype(np.float32)
    return Scan(hu=hu, affine=affine, codes=(C.GANTRY_TILT,))


@pytest.mark.parametrize("geometry", GRIDS)
@pytest.mark.parametrize(("degrees", "about"), [(15, "row"), (-15, "row"), (8, "column"), (-8, "column")])
def test_straightened_volumes_are_judged_by_content(geometry, degrees, about):
    grid = GRIDS[geometry].tilted(degrees, about)
    truth = Truth(grid, codes=frozenset({C.GANTRY_TILT}), straightened=True)
    good = straightened(grid)
    assert misfit(good, truth) == ""
    assert "cut off" in misfit(straightened(grid, room=0.3), truth)
    assert "not straight" in misfit(scan_of(grid=grid, codes=(C.GANTRY_TILT,)), truth)
    shifted = good.affine.copy()
    shifted[:3, 3] += 0.3 * np.array(grid.row)
    assert "HU off" in misfit(replace(good, affine=shifted), truth)
    not_air = np.where(good.hu == AIR_HU, np.float32(0), good.hu)
    assert "not air" in misfit(replace(good, hu=not_air), truth)


def test_a_wrong_expectation_of_a_folder_fails(tmp_path):
    ct = Ct()
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))
    for wrong in (
        refused(C.SLICE_MISSING),
        Expected((Truth(ct.grid), Truth(ct.grid))),
        right(ct, aside={C.NOT_DICOM: 1}),
        right(ct, C.MONO1),
    ):
        with pytest.raises(AssertionError):
            assert_never_silently_wrong(tmp_path, wrong)
    (tmp_path / "notes.txt").write_bytes(b"hello")
    with pytest.raises(AssertionError, match="also set aside"):
        assert_never_silently_wrong(tmp_path, right(ct))
