"""Projections against skimage and against what a disk's are known to be."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.transform import radon

from medvit.evaluation.projections import project, reconstruct, view_angles

SIDE = 51
"""Odd, and so is its diagonal: elsewhere skimage turns about another middle."""

ROW, COLUMN = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2


def disk(radius: float, right: float = 0, down: float = 0) -> np.ndarray:
    return (np.hypot(COLUMN - right, ROW - down) < radius).astype(np.float32)


def test_a_disk_is_as_long_as_its_chords():
    (rays,) = project(disk(16)[None], view_angles(SIDE))  # (A, N)
    detector = np.arange(rays.shape[1]) - (rays.shape[1] - 1) / 2
    chords = 2 * np.sqrt(np.maximum(16**2 - detector**2, 0))
    inner = np.abs(detector) < 14
    np.testing.assert_allclose(rays[:, inner].mean(axis=0), chords[inner], rtol=0.03)
    assert not rays[:, np.abs(detector) > 18].any()


def test_projections_are_those_of_skimage():
    image = ndimage.gaussian_filter(disk(12, 6, -4) + 2 * disk(4, -14, 10), 2).astype(np.float32)
    angles = view_angles(SIDE)
    expected = radon(image, theta=-np.degrees(angles), circle=False).T  # it turns the other way
    (found,) = project(image[None], angles)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.02 * expected.max())


@pytest.mark.parametrize(("right", "down"), [(0, 0), (7, -5)])
def test_what_is_projected_comes_back(right, down):
    images = np.stack([disk(12, right, down), 3 * disk(12, right, down)])
    angles = view_angles(SIDE)
    found = reconstruct(project(images, angles), angles, SIDE)
    core, outside = disk(9, right, down) > 0, disk(15, right, down) == 0
    for picture, value in zip(found, (1, 3), strict=True):
        np.testing.assert_allclose(picture[core], value, rtol=0.03)
        assert np.abs(picture[outside]).mean() < 0.01 * value


def test_corners_of_the_picture_are_seen():
    corner = np.zeros((1, SIDE, SIDE), np.float32)
    corner[0, 1:5, 1:5] = 1
    angles = view_angles(SIDE)
    np.testing.assert_allclose(project(corner, angles).sum(axis=2), 16, rtol=0.03)
