"""Where slices lie in the patient: order, spacing, affine. Array functions, no files.

Everything follows from ImagePositionPatient projected on the slice normal (PS3.3 C.7.6.2.1.1). InstanceNumber, file
names and SliceLocation are never used: real series have them shuffled, absent or wrong. The patient system is LPS, mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvit.records import ReasonCode, Scan, ScanError

Floats = npt.NDArray[np.float64]

SPACING_LIMITS_MM = (0.01, 100.0)
"""Voxel edges of any CT lie between. A header in metres or microns, or a damaged one, does not."""

FARTHEST_MM = 1e5
"""No table moves a slice further from the origin."""

ORTHONORMAL_TOLERANCE = 1e-3
"""Largest deviation of ImageOrientationPatient from two orthogonal unit vectors: rounding in headers stays below."""

SPACING_TOLERANCE = 0.01
"""Largest deviation of a slice distance from the median, as its share: rounding in headers stays below."""

SPACING_TOLERANCE_MM = 0.05
"""The same in mm, and how far positions written with one decimal are off."""


MISSING_SHARE = 0.4
"""Of the slice distance: further from a regular grid than this a slice lies where one is missing."""


@dataclass(frozen=True)
class Stack:
    """Slices in order along their normal.

    Attributes:
        order: (Z,) indices that sort the given positions along the normal, ascending.
        affine: (4, 4) voxel (x, y, z, 1) of the sorted stack -> patient LPS, mm; its axes are not orthogonal where the
            gantry was tilted.
        tilt_degrees: between the table's motion and the slice normal; 0 where it is no more than rounding.
    """

    order: npt.NDArray[np.intp]
    affine: Floats
    tilt_degrees: float = 0.0


def slice_normal(orientation: Floats) -> Floats:
    """Unit normal (3,) of a slice from ImageOrientationPatient (6,): row direction × column direction.

    Raises:
        ScanError: `ORIENTATION_INVALID`: not two orthogonal unit vectors within `ORTHONORMAL_TOLERANCE`.
    """
    row, column = orientation[:3], orientation[3:]
    deviation = max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column))
    if not deviation <= ORTHONORMAL_TOLERANCE:  # NaN is invalid too
        raise ScanError(
            ReasonCode.ORIENTATION_INVALID, f"direction cosines are not orthonormal (off by {deviation:.3g})"
        )
    (a, b, c), (u, v, w) = row, column  # np.cross takes fifty times as long
    normal: Floats = np.array([b * w - c * v, c * u - a * w, a * v - b * u])
    return normal / np.linalg.norm(normal)


def stack_slices(positions: Floats, orientation: Floats, spacing_mm: Floats, thickness_mm: float | None) -> Stack:
    """Sort slices and build their affine, refusing what is no regular grid.

    Args:
        positions: (Z, 3) ImagePositionPatient, mm LPS.
        orientation: (6,) ImageOrientationPatient, the same for all slices.
        spacing_mm: (2,) PixelSpacing: distance between rows, distance between columns.
        thickness_mm: slice spacing of a single slice; None counts as 1 mm.

    Raises:
        ScanError: `ORIENTATION_INVALID`, `DUP_POSITION`, `SLICE_MISSING` or `SPACING_NONUNIFORM`.
    """
    normal = slice_normal(orientation)
    distance = positions @ normal
    order = np.argsort(distance, kind="stable")
    tilt = 0.0
    if len(order) == 1:
        step = normal * (thickness_mm or 1.0)
    else:
        _check_spacing(distance[order])
        step = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
        tilt = _tilt(positions[order], step, normal)
    affine = np.eye(4)
    # PS3.3 C.7.6.2.1.1: the row direction is along increasing column index, PixelSpacing[1] apart
    affine[:3, 0] = orientation[:3] * spacing_mm[1]
    affine[:3, 1] = orientation[3:] * spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    affine += 0.0  # -0 is written by some slices of a series: which one is first must not show
    return Stack(order=order, affine=affine, tilt_degrees=tilt)


def _check_spacing(distance: Floats) -> None:
    gaps = np.diff(distance)
    if (gaps < SPACING_TOLERANCE_MM).any():
        same = int((gaps < SPACING_TOLERANCE_MM).sum())
        raise ScanError(ReasonCode.DUP_POSITION, f"{same} of {len(distance)} slices repeat a position")
    typical = float(np.median(gaps))
    off = np.abs(gaps - typical) > max(SPACING_TOLERANCE * typical, SPACING_TOLERANCE_MM)
    # positions each rounded to one decimal: distances vary by twice that, but no slice leaves the regular grid
    astray = np.abs(distance - np.linspace(distance[0], distance[-1], len(distance))).max()
    # a missing slice pushes its neighbours half a step astray, which of thin slices is no more than rounding
    if not off.any() or astray <= min(2 * SPACING_TOLERANCE_MM, MISSING_SHARE * typical):
        return
    multiples = gaps[off] / typical
    whole = np.abs(multiples - np.round(multiples)) <= SPACING_TOLERANCE * np.round(multiples) + 1e-9
    where = ", ".join(f"{distance[i]:.2f}..{distance[i + 1]:.2f}" for i in np.flatnonzero(off)[:3])
    if (np.round(multiples) >= 2).all() and whole.all():
        missing = int((np.round(multiples) - 1).sum())
        raise ScanError(ReasonCode.SLICE_MISSING, f"{missing} missing at {typical:g} mm spacing, between {where} mm")
    raise ScanError(
        ReasonCode.SPACING_NONUNIFORM, f"distances from {gaps.min():.3f} to {gaps.max():.3f} mm, first at {where} mm"
    )


def _tilt(positions: Floats, step: Floats, normal: Floats) -> float:
    """Degrees between the line of slice origins and the normal: a constant in-plane drift is gantry tilt.

    The angle is never taken from (0018,1120), which is "not intended for mathematical computations" (PS3.3 C.8.2.1.1).
    """
    ideal = positions[0] + np.arange(len(positions))[:, None] * step
    if np.abs(positions - ideal).max() > max(2 * SPACING_TOLERANCE_MM, SPACING_TOLERANCE * float(np.linalg.norm(step))):
        raise ScanError(ReasonCode.SPACING_NONUNIFORM, "slice origins do not lie on one line")
    along = float(step @ normal)
    drift = float(np.linalg.norm(step - along * normal))
    # over the whole stack: half a millimetre of shear is more than rounding
    if drift * (len(positions) - 1) <= max(0.5, SPACING_TOLERANCE * abs(along) * len(positions)):
        return 0.0
    return float(np.degrees(np.arctan2(drift, abs(along))))


def straightened(affine: Floats, shape: tuple[int, int, int]) -> tuple[Floats, tuple[int, int, int], Floats]:
    """The orthogonal grid that holds all slices of a sheared stack.

    Args:
        affine: (4, 4) of the sheared stack.
        shape: its (Z, Y, X).

    Returns:
        (4, 4) affine and (Z, Y, X) of the straight grid, and (Z, 2) how far each slice moves, in pixels (x, y), >= 0.
    """
    x_axis, y_axis, step = affine[:3, 0], affine[:3, 1], affine[:3, 2]
    in_plane = np.array([step @ x_axis / (x_axis @ x_axis), step @ y_axis / (y_axis @ y_axis)])  # pixels per slice
    moves = np.arange(shape[0])[:, None] * in_plane
    least = moves.min(axis=0)
    extra = np.ceil(moves.max(axis=0) - least - 1e-6).astype(int)
    straight = affine.copy()
    straight[:3, 2] = step - in_plane[0] * x_axis - in_plane[1] * y_axis
    straight[:3, 3] = affine[:3, 3] + least[0] * x_axis + least[1] * y_axis
    return straight, (shape[0], shape[1] + int(extra[1]), shape[2] + int(extra[0])), moves - least


def straighten(hu: npt.NDArray[np.float32], affine: Floats, fill: float) -> npt.NDArray[np.float32]:
    """Undo gantry tilt: move each slice in its plane, by linear interpolation, onto the grid of `straightened`.

    Nothing is cut off: the matrix grows by the drift; what no slice covers is `fill`.

    Args:
        hu: (Z, Y, X).
        affine: (4, 4), sheared.
        fill: HU of what lies outside every slice.
    """
    _, shape, moves = straightened(affine, (hu.shape[0], hu.shape[1], hu.shape[2]))
    result = np.full(shape, fill, np.float32)
    for plane, target, (across, down) in zip(hu, result, moves, strict=True):
        target[:] = _moved(_moved(plane, down, shape[1], fill).T, across, shape[2], fill).T
    return result


def _moved(plane: npt.NDArray[np.float32], pixels: float, length: int, fill: float) -> npt.NDArray[np.float32]:
    """Rows moved towards higher index by a number of pixels >= 0, into an array of `length` rows."""
    whole = int(np.floor(pixels + 1e-6))
    share = max(0.0, pixels - whole)
    if share < 1e-6:
        between = plane
    else:
        # a row that only one neighbour reaches keeps that neighbour: no blend of tissue and fill
        between = np.concatenate([plane[:1], plane[1:] * (1 - share) + plane[:-1] * share, plane[-1:]])
    result = np.full((length, plane.shape[1]), fill, np.float32)
    end = min(length, whole + len(between))
    result[whole:end] = between[: end - whole]
    return result


def reorient_lps(scan: Scan) -> Scan:
    """The same voxels with x nearest to the patient's left, y to the back, z to the head; no resampling.

    Oblique volumes get the nearest axis order; the affine keeps the obliquity.
    """
    order, signs = _nearest_axes(scan.affine)
    # axes of hu are (Z, Y, X), columns of the affine are (x, y, z)
    hu = np.transpose(scan.hu, [2 - order[2 - axis] for axis in range(3)])
    affine = scan.affine.copy()
    affine[:3, :3] = scan.affine[:3, order]
    for axis, sign in enumerate(signs):
        if sign < 0:
            last = hu.shape[2 - axis] - 1
            affine[:3, 3] += affine[:3, axis] * last
            affine[:3, axis] *= -1
            hu = np.flip(hu, 2 - axis)
    return Scan(
        hu=np.ascontiguousarray(hu),
        affine=affine,
        header=scan.header,
        codes=scan.codes,
        padding_fraction=scan.padding_fraction,
        files=scan.files,
    )


def slice_direction(affine: Floats) -> int:
    """How `reorient_lps` orders the slices of a volume: 1 as they are, -1 backwards; 0: it cuts across them."""
    order, signs = _nearest_axes(affine)
    return int(signs[2]) if order[2] == 2 else 0


def _nearest_axes(affine: Floats) -> tuple[list[int], list[float]]:
    """For each patient axis L, P, S: the voxel axis nearest to it, and its sign. Largest cosines are taken first."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)  # (patient axis, voxel axis)
    order, signs, free = [0, 0, 0], [0.0, 0.0, 0.0], np.abs(cosines)
    for _ in range(3):
        patient, voxel = np.unravel_index(int(free.argmax()), free.shape)
        order[patient], signs[patient] = int(voxel), float(np.sign(cosines[patient, voxel]))
        free[patient, :] = free[:, voxel] = -1
    return order, signs
