"""The slices of one SeriesInstanceUID -> the volumes they really are.

A series UID promises one series, and hospitals break the promise daily: a scout rides along, two kernels or contrast
phases share it, an enhanced object holds a perfusion run. Each is told apart by what the standard says tells it apart,
in a visible order, and only where every part is a volume; otherwise the series is set aside rather than guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medvit.io import geometry
from medvit.io.headers import SharedHeader, SliceHeader, shared_by
from medvit.records import ReasonCode, ScanError

Slices = Sequence[SliceHeader]

PHASES: Mapping[str, Callable[[SliceHeader], object]] = {
    "kernel": lambda one: one.shared.scan.kernel,
    "acquisition": lambda one: one.acquisition,
    "temporal position": lambda one: one.temporal,
    "cardiac phase": lambda one: one.shared.cardiac_phase,
    "image type": lambda one: "/".join(one.shared.image_type),
    "kV": lambda one: one.shared.kvp,
    "slice thickness": lambda one: one.shared.thickness_mm,
    "contrast": lambda one: one.shared.scan.contrast,
    "acquisition time": lambda one: one.times.split(" ")[0],
    "content time": lambda one: one.times.split(" ")[1],
    "trigger time": lambda one: one.times.split(" ")[2],
}
"""What tells volumes at the same positions apart: asked in this order."""

FEWEST = 3
"""Slices that make a volume of their own beside another; one or two are a scout or a stray."""

SCOUT_DEGREES = 20.0
"""A stray slice turned further than this is a localizer; less is a damaged orientation."""


@dataclass(frozen=True)
class Part:
    """One volume of a series. `phase` tells it from the others that shared its positions."""

    slices: tuple[SliceHeader, ...]
    phase: str = ""


@dataclass(frozen=True)
class Parts:
    """The volumes of a series, largest first, and the slices that are localizers."""

    volumes: tuple[Part, ...]
    localizers: tuple[SliceHeader, ...] = ()


def split(slices: Slices) -> Parts:
    """Tell the volumes of a series apart.

    Args:
        slices: of one series, each with orientation, position and spacing.

    Raises:
        ScanError: `MATRIX_MISMATCH`, `ORIENTATION_INVALID` or `DUP_POSITION`: it cannot be told.
    """
    grids, localizers = _by_grid(slices)
    volumes = [part for grid in grids for part in _by_phase(grid, "", list(PHASES))]
    volumes.sort(key=lambda part: (-len(part.slices), part.phase, part.slices[0].sop_uid))
    return Parts(tuple(volumes), tuple(localizers))


def _by_grid(slices: Slices) -> tuple[list[list[SliceHeader]], list[SliceHeader]]:
    """One list per direction, matrix, pixel spacing and frame of reference; and localizers."""
    keys = {number: _grid_key(shared) for number, shared in shared_by(slices).items()}
    if len(set(keys.values())) == 1:
        return [list(slices)], []
    buckets: dict[tuple[object, ...], list[SliceHeader]] = defaultdict(list)
    for one in slices:
        buckets[keys[id(one.shared)]].append(one)
    main, *others = sorted(buckets.values(), key=lambda bucket: (-len(bucket), bucket[0].sop_uid))
    grids, localizers = [main], []
    for other in others:
        if _fits(main, other):
            main.extend(other)
        elif _is_localizer(main, other):
            localizers += other
        else:
            grids.append(_own_volume(main, other))
    return grids, localizers


def _grid_key(shared: SharedHeader) -> tuple[object, ...]:
    direction = tuple(round(value, 3) for value in shared.orientation or ())
    spacing = tuple(round(value, 4) for value in shared.spacing_mm or ())
    return direction, shared.frame_of_reference, shared.rows, shared.columns, spacing


def _turn_degrees(one: SliceHeader, other: SliceHeader) -> float:
    """The larger angle between the row directions or the normals of two slices."""
    first, second = np.array(one.shared.orientation), np.array(other.shared.orientation)
    cosines = (first[:3] @ second[:3], geometry.slice_normal(first) @ geometry.slice_normal(second))
    return float(np.degrees(np.arccos(np.clip(min(cosines), -1, 1))))


def _fits(main: Slices, other: Slices) -> bool:
    """Whether only rounding of orientation or pixel spacing parts them."""
    one, two = main[0].shared, other[0].shared
    if (one.frame_of_reference, one.rows, one.columns) != (two.frame_of_reference, two.rows, two.columns):
        return False
    turned = np.abs(np.array(one.orientation) - np.array(two.orientation)).max()
    return bool(turned <= geometry.ORTHONORMAL_TOLERANCE) and np.allclose(
        one.spacing_mm or (), two.spacing_mm or (), rtol=1e-3
    )


def _is_localizer(main: Slices, other: Slices) -> bool:
    """Whether these are few slices in another plane; turned or mirrored in the same plane, they are damaged ones."""
    one, two = (geometry.slice_normal(np.array(stack[0].shared.orientation)) for stack in (main, other))
    tilted = np.degrees(np.arccos(min(1.0, abs(float(one @ two)))))
    return len(other) < FEWEST <= len(main) and bool(tilted > SCOUT_DEGREES)


def _own_volume(main: Slices, other: list[SliceHeader]) -> list[SliceHeader]:
    """`other` where it is a volume beside `main`.

    Raises:
        ScanError: it is a stray slice, or the two are pieces of one volume that was torn apart.
    """
    one, two = main[0].shared, other[0].shared
    turned = _turn_degrees(main[0], other[0])
    stray = len(other) < FEWEST
    if turned > SCOUT_DEGREES and not stray:
        return other
    if turned > np.degrees(geometry.ORTHONORMAL_TOLERANCE) and (stray or turned <= SCOUT_DEGREES):
        raise ScanError(
            ReasonCode.ORIENTATION_INVALID, "slices of one series point in different directions", _paths(other)
        )
    if one.frame_of_reference != two.frame_of_reference:
        if stray or not _overlap(main, other):
            detail = "slices of one series have different frames of reference"
            raise ScanError(ReasonCode.ORIENTATION_INVALID, detail, _paths(other))
        return other
    if stray or not _overlap(main, other):
        detail = f"{len(other)} of {len(main) + len(other)} slices have another matrix or pixel spacing"
        raise ScanError(ReasonCode.MATRIX_MISMATCH, detail, _paths(other))
    return other


def _overlap(main: Slices, other: Slices) -> bool:
    """Whether two stacks cover the same stretch, by half of the shorter at least; else they are pieces of one."""
    normal = geometry.slice_normal(np.array(main[0].shared.orientation))
    a, b = (np.array([one.position for one in stack]) @ normal for stack in (main, other))
    common = min(a.max(), b.max()) - max(a.min(), b.min())
    return bool(common > 0.5 * min(np.ptp(a), np.ptp(b)))


def _by_phase(slices: Slices, phase: str, questions: list[str]) -> list[Part]:
    """Split by the first question whose answers make volumes, and each of those further."""
    whole = Part(tuple(slices), phase)
    repeats = len(_positions(slices)) < len(slices)
    # of slices that are alike in all that is asked, one will do
    few = list({(id(one.shared), one.acquisition, one.temporal, one.times): one for one in slices}.values())
    for number, question in enumerate(questions):
        ask = PHASES[question]
        if len({ask(one) for one in few}) == 1:
            continue
        answers: dict[object, list[SliceHeader]] = defaultdict(list)
        for one in slices:
            answers[ask(one)].append(one)
        if not (_all_volumes(slices, answers.values()) if repeats else _interleaved(answers)):
            continue
        rest = questions[number + 1 :]
        return [
            volume
            for order, (answer, members) in enumerate(sorted(answers.items(), key=lambda item: str(item[0])), 1)
            for volume in _by_phase(members, f"{phase} {question} {_shown(question, answer, order)}".strip(), rest)
        ]
    if repeats:
        positions = len(_positions(slices))
        raise ScanError(
            ReasonCode.DUP_POSITION,
            f"{len(slices)} slices at {positions} positions, and nothing in their headers tells them apart",
            _paths(slices),
        )
    return [whole]


def _shown(question: str, answer: object, order: int) -> str:
    """The answer as a phase is called; free text, in which people write names, by its number."""
    return str(order) if question == "contrast" else str(answer or "none")


def _all_volumes(slices: Slices, parts: Iterable[Slices]) -> bool:
    """Whether each part could be a volume: no stray of one or two slices, where there are more positions."""
    positions = len(_positions(slices))
    main, *others = sorted(parts, key=len, reverse=True)
    if positions > 1 and not all(_overlap(main, other) for other in others):
        return False  # it tells positions of the table apart, not phases
    return all(len(_positions(part)) >= min(FEWEST, positions) for part in (main, *others))


def _positions(slices: Slices) -> set[tuple[float, ...]]:
    """Where slices lie, to a tenth of a millimetre: phases of one table position differ by rounding."""
    return set(map(tuple, np.round([one.position for one in slices], 1).tolist()))


def _interleaved(answers: Mapping[object, Slices]) -> bool:
    """Whether the answers run through the same stretch at different positions: two acquisitions, not one volume."""
    main, *others = sorted(answers.values(), key=len, reverse=True)
    return len(main) >= FEWEST and all(len(other) >= FEWEST and _overlap(main, other) for other in others)


def _paths(slices: Slices) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.path for one in slices))
