"""One DICOM series -> HU volume, geometry, identity.

Headers are read and judged here, in the caller's process, by a reader that cannot be made to inflate, recurse or
allocate; pixels are decoded by the sandbox. The check of what forms a volume is the same when a folder is listed and
when a series is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medvit.io import faults, geometry, grouping, headers, sandbox
from medvit.io.headers import SliceHeader
from medvit.io.pixels import Frame, Layout
from medvit.io.plausible import Tally, check_plausible
from medvit.records import AIR_HU, REASONS, Outcome, ReasonCode, Scan, ScanError

ASSUMED_AIR_HU = (-1100.0, -500.0)
"""Where the lowest value must lie for --assume-hu to hold."""

GAP_SHARE = 1.5
"""Slices further apart than this many thicknesses leave tissue unseen between them."""


@dataclass(frozen=True)
class Volume:
    """Slices that form one volume, before their pixels are read.

    Attributes:
        slices: sorted along their normal.
        stack: their grid, as stored.
        codes: flags.
        affine: (4, 4) and `shape` (Z, Y, X) of the volume, with gantry tilt undone.
    """

    slices: tuple[SliceHeader, ...]
    stack: geometry.Stack
    codes: tuple[ReasonCode, ...]
    affine: geometry.Floats
    shape: tuple[int, int, int]


def check_headers(slices: Sequence[SliceHeader], *, assume_hu: bool = False) -> tuple[ReasonCode, ...]:
    """Flags of slices that could be one series, from each header alone.

    Raises:
        ScanError: the first fault that forbids using the series, and the files that have it.
    """
    kinds = headers.shared_by(slices)
    if faults.differ(each.patient for each in kinds.values()):
        raise ScanError(ReasonCode.PATIENT_CONFLICT, "patient id, birth date or sex differ between slices")
    shared = {key: faults.shared_faults(each) for key, each in kinds.items()}
    if not any(shared.values()) and not any(faults.slice_faults(one, assume_hu=assume_hu) for one in slices):
        return ()
    found = [
        (code, detail, one.path)
        for one in slices
        for code, detail in shared[id(one.shared)] + faults.slice_faults(one, assume_hu=assume_hu)
    ]
    for code, detail, _ in found:
        if REASONS[code].outcome is not Outcome.FLAG:
            raise ScanError(code, detail, tuple(dict.fromkeys(path for other, _, path in found if other is code)))
    return tuple(dict.fromkeys(code for code, _, _ in found))


def examine(part: grouping.Part, flags: tuple[ReasonCode, ...], *, assume_hu: bool = False) -> Volume:
    """Check that slices form one volume.

    Raises:
        ScanError: they do not; the code says why.
    """
    slices = part.slices
    first = slices[0].shared
    # judged once for all slices of one length
    if any(faults.wrong_length(one) for one in {(id(one.shared), one.pixels[1]): one for one in slices}.values()):
        wrong = [one for one in slices if faults.wrong_length(one)]
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, faults.wrong_length(wrong[0]), headers.names_of(wrong))
    stack = geometry.stack_slices(
        np.array([one.position for one in slices]),
        np.array(first.orientation),
        np.array(first.spacing_mm),
        first.thickness_mm,
    )
    shape = (len(slices), first.rows, first.columns)
    affine = stack.affine
    codes = list(flags)
    if stack.tilt_degrees:
        codes.append(ReasonCode.GANTRY_TILT)
        affine, shape, _ = geometry.straightened(affine, shape)
    if np.prod(shape, dtype=float) > faults.MAX_VOXELS:
        raise ScanError(ReasonCode.RESOURCE_LIMIT, f"{shape[0]} x {shape[1]} x {shape[2]} voxels")
    kinds = headers.shared_by(slices).values()
    if part.phase or len({each.scan.kernel for each in kinds}) > 1:
        codes.append(ReasonCode.MULTIPHASE)
    step_mm = float(np.linalg.norm(affine[:3, 2]))
    if len(slices) > 1 and first.thickness_mm and step_mm > GAP_SHARE * first.thickness_mm:
        codes.append(ReasonCode.SLICE_GAPS)
    if assume_hu and not all(each.rescale_tags for each in kinds):
        codes.append(ReasonCode.RESCALE_MISSING)
    ordered = tuple(slices[index] for index in stack.order)
    return Volume(ordered, stack, tuple(dict.fromkeys(codes)), affine, shape)


def read_series(paths: Iterable[Path], *, assume_hu: bool = False, part: int | None = None) -> Scan:
    """Read the files of one series, in any order, into one volume.

    Args:
        paths: its files.
        assume_hu: take values without rescale tags for HU, and flag them.
        part: which volume, where the files hold several; None: they hold one.

    Raises:
        ScanError: with the code of the first fault, and the files concerned.
    """
    return read_volume(*examine_files(paths, assume_hu=assume_hu, part=part))


def examine_files(paths: Iterable[Path], *, assume_hu: bool = False, part: int | None = None) -> tuple[Volume, str]:
    """The volume of `read_series` before its pixels are read, and its phase."""
    reader = headers.HeaderReader()
    slices = [one for path in paths for one in reader.read(path, str(path))]
    for one in slices:
        if (fault := faults.file_fault(one)) is not None:
            raise ScanError(*fault, (one.path,))
    flags = check_headers(slices, assume_hu=assume_hu)
    if len({(one.shared.study_uid, one.shared.series_uid) for one in slices}) > 1:
        raise ScanError(ReasonCode.TAG_INVALID, "files of several series", headers.names_of(slices))
    volumes = grouping.split(slices).volumes
    # the files of one part of several hold that part alone, unless the parts are frames of the same files
    if len(volumes) > 1 and (part is None or part >= len(volumes)):
        detail = f"{len(volumes)} volumes in these files, and none of them asked for: list the folder, read its series"
        raise ScanError(ReasonCode.MULTIPHASE, detail, headers.names_of(slices))
    chosen = volumes[part or 0] if len(volumes) > 1 else volumes[0]
    return examine(chosen, flags, assume_hu=assume_hu), chosen.phase


def read_volume(volume: Volume, phase: str = "") -> Scan:
    """Decode the slices of an examined volume."""
    slices = volume.slices
    layouts: dict[Layout, int] = {}
    frames = [_frame(one, plane, layouts) for plane, one in enumerate(slices)]
    shape = (len(slices), slices[0].shared.rows, slices[0].shared.columns)
    hu, tallies = sandbox.decode(shape, list(layouts), frames)
    check_plausible(tallies)
    codes = volume.codes
    if ReasonCode.RESCALE_MISSING in codes:
        _check_assumed(tallies)
    padded = sum(tally.padded for tally in tallies)
    if padded:
        codes = (*codes, ReasonCode.PADDING_APPLIED)
    if volume.stack.tilt_degrees:
        hu = geometry.straighten(hu, volume.stack.affine, AIR_HU)
    return Scan(
        hu=hu,
        affine=volume.affine,
        header=replace(slices[0].shared.scan, sop_uids=tuple(one.sop_uid for one in slices), phase=phase),
        codes=codes,
        padding_fraction=padded / np.prod(shape),
        files=headers.names_of(slices),
    )


def _frame(one: SliceHeader, plane: int, layouts: dict[Layout, int]) -> Frame:
    shared = one.shared
    layout = Layout(
        shared.transfer_syntax,
        shared.rows,
        shared.columns,
        shared.bits_allocated,
        shared.bits_stored,
        shared.high_bit,
        bool(shared.signed),
        shared.padding,
        shared.overlays,
        shared.photometric,
        shared.frames,
    )
    slope = 1.0 if one.slope is None else one.slope
    intercept = 0.0 if one.intercept is None else one.intercept
    number = layouts.setdefault(layout, len(layouts))
    return Frame(one.path, one.frame, plane, (one.size, one.mtime_ns), *one.pixels, slope, intercept, number)


def _check_assumed(tallies: Sequence[Tally]) -> None:
    """Unrescaled values pass for HU only where they show air: a lowest value near -1000."""
    least, most = ASSUMED_AIR_HU
    low = min(tally.low for tally in tallies)
    if not least <= low <= most:
        detail = f"assumed to be HU, but the lowest value is {low:g}, not {least:g} to {most:g}"
        raise ScanError(ReasonCode.RESCALE_MISSING, detail)
