"""The same pixels under other names: copies that were re-identified, compressed again, or exported in part.

Compared are prepared slices, so matrix size, order and orientation of the export do not matter. Two cases with one
identical slice hold the same scan: noise never repeats. For what lossy compression or a re-export changed, each slice
is reduced to a thumbnail of 16 x 16 block means in HU. Measured as root mean square between thumbnails, in HU:

    the same slice            82 heads    54 chests    one trunk    synthetic, noise 50 HU
    JPEG 2000, 10:1 / 20:1    0.1 / 0.3   0.7 / 1.3    0.3 / 0.6    3.2 / -
    JPEG-LS, error 2 / 5      1.0 / 3.1   0.2 / 0.2    0.1 / 0.1    -
    smoothed by 1 px          0.6         3.0          1.3          -
    two patients' nearest     4.9         148          -            29

The largest over all slices; in the last row, the smallest over all pairs. The heads are the hardest case: pictures of
120 grey values (contrast 30 HU, others 300 to 450) with one background. `NEAR_HU` and `NEAR_SHARE` lie between. In a
set of thousands single pairs come closer, so that half of the shorter series must be found in the other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from medvit.data.pipelines import Slices
from medvit.records import Case

NEAR_HU, NEAR_SHARE = 3.0, 0.02
"""Thumbnails show one slice that differ (root mean square) by less than this, or this share of the slice's contrast."""

FOUND_SHARE = 0.5
"""Share of the shorter series' slices that must be found in the other."""

THUMBNAIL = 16
COARSE = 4
"""Thumbnails are searched by their own 4 x 4 block means, which never differ more than the thumbnails themselves."""

AIR, METAL = -1000, 3071
"""HU are clipped to these: padding is air, and exports cut the values of metal differently."""

BODY_HU, BODY_SHARE = -500, 0.05
"""A slice shows a body where this share of its thumbnail is denser; an empty table looks alike for everybody."""

CONTRAST_HU = 10.0
"""A slice of less contrast (standard deviation of its thumbnail) shows nothing."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SlicePrints:
    """What is compared of a case: its slices that show a body.

    Attributes:
        hashes: one per slice, of its exact HU.
        thumbnails: float32, (N, 256), HU.
    """

    hashes: tuple[bytes, ...]
    thumbnails: Floats


def slice_prints(slices: Slices) -> SlicePrints:
    """The prints of prepared slices, int16 HU (Z, size, size)."""
    thumbnails = np.stack([_thumbnail(plane) for plane in slices])
    body = ((thumbnails > BODY_HU).mean(axis=1) >= BODY_SHARE) & (thumbnails.std(axis=1) >= CONTRAST_HU)
    hashes = (hashlib.sha256(plane.tobytes()).digest() for plane in slices[body])
    return SlicePrints(tuple(hashes), thumbnails[body])


def _thumbnail(plane: npt.NDArray[np.int16]) -> Floats:
    values = np.clip(plane, AIR, METAL).astype(np.float32)
    small = cv2.resize(values, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32).ravel()


def identical_slices(prints: Mapping[str, SlicePrints]) -> list[tuple[str, ...]]:
    """Clusters of cases (ids, in order of `prints`) that share a slice pixel by pixel."""
    holders: dict[bytes, dict[str, None]] = defaultdict(dict)
    for name, one in prints.items():
        for digest in one.hashes:
            holders[digest][name] = None
    return list(dict.fromkeys(tuple(names) for names in holders.values() if len(names) > 1))


def near_copies(cases: Sequence[Case], prints: Mapping[str, SlicePrints]) -> list[tuple[str, str]]:
    """Pairs of cases (ids) of different patients that show the same slice, in series that share half their slices.

    Every slice is compared with every other, not a sample of each series: a part of a series has its slices elsewhere.
    Series and not cases are compared, so that single slices as cases are judged with their neighbours.
    """
    present = [case for case in cases if case.case_id in prints and prints[case.case_id].hashes]
    if not present:
        return []
    owners = np.repeat(np.arange(len(present)), [len(prints[case.case_id].hashes) for case in present])
    series_of_case = _numbers([(case.patient_id, case.series_uid or case.case_id, case.part) for case in present])
    patients, series = _numbers([case.patient_id for case in present])[owners], series_of_case[owners]
    shared: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for one, near in _near_slices(np.concatenate([prints[case.case_id].thumbnails for case in present]), patients):
        for other in near:
            shared[int(series[one]), int(series[other])].append((one, int(other)))
    lengths = np.bincount(series)
    pairs: dict[tuple[int, int], None] = {}
    for (one, two), found in shared.items():
        if lengths[one] <= lengths[two] and len({row for row, _ in found}) >= FOUND_SHARE * lengths[one]:
            pairs |= {(int(owners[row]), int(owners[other])): None for row, other in found}
    return [(present[one].case_id, present[two].case_id) for one, two in pairs]


def _numbers(names: Sequence[object]) -> npt.NDArray[np.intp]:
    """0, 1, ... for each different name, in order of appearance."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], np.intp)


def _near_slices(thumbnails: Floats, patients: npt.NDArray[np.intp]) -> list[tuple[int, npt.NDArray[np.intp]]]:
    """(slice, the near ones of other patients) where there are some. Thumbnails (N, 256), patients (N,)."""
    side = THUMBNAIL // COARSE
    coarse = thumbnails.reshape(-1, COARSE, side, COARSE, side).mean(axis=(2, 4)).reshape(-1, COARSE**2)
    limits = np.maximum(NEAR_HU, NEAR_SHARE * thumbnails.std(axis=1))
    tree, found = cKDTree(coarse), []
    for number, (point, limit) in enumerate(zip(coarse, limits, strict=True)):
        candidates = np.array(tree.query_ball_point(point, limit * COARSE), np.intp)  # RMS -> Euclidean: x sqrt(16)
        candidates = candidates[patients[candidates] != patients[number]]
        if len(candidates):
            distance = np.sqrt(((thumbnails[candidates] - thumbnails[number]) ** 2).mean(axis=1))
            if len(near := candidates[distance < limit]):
                found.append((number, near))
    return found
