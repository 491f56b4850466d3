"""Orientation, compared in the patient: the value at each point stays what it was."""

import itertools

import numpy as np
import pytest
from ct_builder import GRIDS, Ct, Grid, assert_is_phantom, phantom_at, phantom_hu, world_points
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.io import read, read_files, reorient_lps
from medvit.records import Scan, ScanHeader

MOVES = [(order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


def moved(order, flips):
    """The phantom with its voxel axes (x, y, z) permuted and flipped, and the affine that undoes it."""
    hu, affine = phantom_hu().transpose(2, 1, 0), Grid().affine  # (X, Y, Z)
    hu = hu.transpose(order)
    affine = affine[:, [*order, 3]]
    for axis, flip in enumerate(flips):
        if flip < 0:
            hu = np.flip(hu, axis)
            affine = affine.copy()
            affine[:3, 3] += affine[:3, axis] * (hu.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Scan(hu=np.ascontiguousarray(hu.transpose(2, 1, 0), dtype=np.float32), affine=affine)


@pytest.mark.parametrize(("order", "flips"), MOVES)
def test_reorienting_moves_no_value_in_the_patient(order, flips):
    scan = moved(order, flips)
    assert_is_phantom(scan)  # the test's own affine is right
    oriented = reorient_lps(scan)
    assert_is_phantom(oriented)
    np.testing.assert_allclose(oriented.affine, Grid().affine, atol=1e-9)
    np.testing.assert_array_equal(oriented.hu, phantom_hu())


@pytest.mark.parametrize("name", GRIDS)
def test_axes_are_nearest_to_left_posterior_superior(tmp_path, name):
    Ct(grid=GRIDS[name]).write(tmp_path)
    oriented = reorient_lps(read(tmp_path))
    assert_is_phantom(oriented, GRIDS[name])
    cosines = oriented.affine[:3, :3] / np.linalg.norm(oriented.affine[:3, :3], axis=0)
    assert (np.abs(cosines).argmax(axis=0) == (0, 1, 2)).all()
    assert (np.diag(cosines) > 0).all()


@settings(max_examples=30, deadline=None)
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), flip=st.sampled_from([1, -1]))
def test_any_oblique_volume_keeps_its_values_in_the_patient(angles, flip):
    a, b, c = np.radians(angles)
    turn = (
        np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        @ np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        @ np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    )
    grid = Grid(row=tuple(turn[:, 0]), column=tuple(turn[:, 1]), step=tuple(flip * 2.5 * turn[:, 2]))
    oriented = reorient_lps(Scan(hu=phantom_hu().astype(np.float32), affine=grid.affine))
    points = world_points(oriented.affine, oriented.hu.shape)
    np.testing.assert_allclose(oriented.hu, phantom_at(points, grid), atol=1e-2)
    assert (np.diag(oriented.affine)[:3] > 0).any()


def test_reorienting_keeps_everything_else():
    header = ScanHeader(patient_id="p", sop_uids=("1", "2"))
    scan = Scan(hu=phantom_hu().astype(np.float32), affine=Grid().affine, header=header, padding_fraction=0.25)
    oriented = reorient_lps(scan)
    assert (oriented.header, oriented.padding_fraction) == (header, 0.25)


def test_a_negative_zero_of_one_slice_does_not_show(tmp_path):
    """Some slices of a series say -0 and some 0: read in another order, the affine is the same to the bit."""

    def signed(dataset, index):
        dataset.ImageOrientationPatient = ["1", "-0", "0", "0", "1", "-0"] if index % 2 else [1, 0, 0, 0, 1, 0]

    paths = Ct(edit=signed).write(tmp_path)
    scans = [read_files(order) for order in (paths, paths[::-1], paths[1:] + paths[:1])]
    assert len({scan.affine.tobytes() for scan in scans}) == 1
