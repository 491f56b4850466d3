"""The judge of every hazard: what a folder holds in truth, and `assert_never_silently_wrong`.

A folder may end in two ways only. Its volumes are right in the patient, within 1 HU and 0.1 mm, with the flags that the
fault deserves; or its files are set aside under the expected code. Every file ends somewhere, and no text that a user
or a log may see names the patient or the folder.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ct_builder import GRIDS, SLICES, Ct, Grid, phantom_hu, world_points
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from medvit.io import Inventory, Series, read, scan_folder
from medvit.records import AIR_HU, Outcome, ReasonCode, Scan, ScanError

C = ReasonCode
HU_TOLERANCE, MM_TOLERANCE = 1.0, 0.1
GEOMETRIES = ("axial", "head_last", "oblique")
ALL_GEOMETRIES = ("axial", "head_last", "prone", "sagittal", "oblique")
SYNTAXES = (ExplicitVRLittleEndian, JPEGLSLossless)
SECRETS = ("Mueller", "0815", "Schmidt", "19600102")
"""What identifies the patients of these tests."""

Codes = ReasonCode | tuple[ReasonCode, ...]


@dataclass(frozen=True)
class Truth:
    """One volume that must come out.

    Attributes:
        grid: where its voxels lie.
        hu: (Z, Y, X) their values.
        codes: flags that it must carry, and no others except `may`.
        straightened: acquired with a tilted gantry, so it comes out on another, straight grid.
    """

    grid: Grid
    hu: np.ndarray = field(default_factory=phantom_hu)
    codes: frozenset[ReasonCode] = frozenset()
    may: frozenset[ReasonCode] = frozenset()
    straightened: bool = False


@dataclass(frozen=True)
class Expected:
    """What becomes of a folder: its volumes, and how many files are set aside under which code (or one of several)."""

    volumes: tuple[Truth, ...] = ()
    aside: Mapping[Codes, int] = field(default_factory=dict)


def right(ct: Ct, *codes: ReasonCode, aside: Mapping[Codes, int] | None = None, **truth: object) -> Expected:
    """One volume, all of it, with exactly these flags."""
    return Expected((Truth(ct.grid, **{"hu": ct.hu, "codes": frozenset(codes), **truth}),), aside or {})


def refused(codes: Codes, files: int = SLICES) -> Expected:
    """No volume; all files set aside."""
    return Expected(aside={codes: files})


def assert_never_silently_wrong(folder: Path, *expected: Expected) -> list[Scan]:
    """Scan and read the folder; it must end as one of `expected` says.

    Returns:
        The volumes that came out.
    """
    inventory = scan_folder(folder)
    assert_every_file_is_accounted_for(inventory, folder)
    outcomes = [(series, _read(series, folder)) for series in inventory.series]
    faults = [_contradiction(inventory, outcomes, one) for one in expected]
    assert "" in faults, f"{'; or '.join(faults)}\n{_summary(outcomes, inventory)}"
    return [result for _, result in outcomes if isinstance(result, Scan)]


def assert_every_file_is_accounted_for(inventory: Inventory, folder: Path) -> None:
    """One entry per thing in the folder that is no folder; a code wherever a file is not simply used."""
    seen = sorted(
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, folders, files in os.walk(folder)
        for name in [*files, *(name for name in folders if (Path(parent) / name).is_symlink())]
    )
    assert sorted(entry.path for entry in inventory.files) == seen
    assert sum(inventory.counts().values()) == len(seen)
    assert all(entry.code is not None for entry in inventory.files if entry.outcome is not Outcome.OK)
    used = {entry.path for entry in inventory.files if entry.outcome.used}
    assert used == {name for series in inventory.series if series.usable for name in series.files}
    keys = [series.key for series in inventory.series]
    assert len(set(keys)) == len(keys)
    _assert_no_secrets(f"{[(entry.code, entry.detail) for entry in inventory.files]}", folder)


def _read(series: Series, folder: Path) -> Scan | ScanError:
    try:
        scan = read(series)
    except ScanError as error:
        _check_refusal(error, series, folder)
        return error
    assert series.usable, f"{series.codes} was read all the same"
    assert set(series.codes) <= set(scan.codes), "a flag of the listing is lost in the volume"
    assert scan.hu.shape[0] == series.shape[0]
    return scan


def _check_refusal(error: ScanError, series: Series, folder: Path) -> None:
    _assert_no_secrets(f"{error} {error.detail}", folder)
    assert series.usable or error.code in series.codes


def _assert_no_secrets(text: str, folder: Path) -> None:
    assert not [secret for secret in (*SECRETS, str(folder)) if secret in text], "identity in a message"


def _contradiction(inventory: Inventory, outcomes: list[tuple[Series, Scan | ScanError]], expected: Expected) -> str:
    """How the outcome differs from what was expected; empty when it does not."""
    scans = [result for _, result in outcomes if isinstance(result, Scan)]
    if len(scans) != len(expected.volumes):
        return f"{len(scans)} volumes instead of {len(expected.volumes)}"
    for truth in expected.volumes:
        faults = [misfit(scan, truth) for scan in scans]
        if "" not in faults:
            return f"a volume is wrong: {', '.join(faults)}"
        scans.pop(faults.index(""))
    verdicts = Counter(_set_aside(inventory, outcomes))
    for codes, count in expected.aside.items():
        found = sum(verdicts.pop(code, 0) for code in (codes if isinstance(codes, tuple) else (codes,)))
        if found != count:
            return f"{found} files set aside as {codes} instead of {count}"
    return f"also set aside: {dict(verdicts)}" if verdicts else ""


def _set_aside(inventory: Inventory, outcomes: list[tuple[Series, Scan | ScanError]]) -> Iterable[ReasonCode | None]:
    """The code of each file that no volume came of: from the listing, or from the attempt to read its series."""
    came_through = {name for series, result in outcomes if isinstance(result, Scan) for name in series.files}
    failed = {
        name: result.code for series, result in outcomes if isinstance(result, ScanError) for name in series.files
    }
    for entry in inventory.files:
        if not entry.outcome.used:
            yield entry.code
        elif entry.path not in came_through:
            yield failed[entry.path]


def _summary(outcomes: list[tuple[Series, Scan | ScanError]], inventory: Inventory) -> str:
    lines = [f"  series of {len(series.files)} files, {series.codes}: {result!r:.120}" for series, result in outcomes]
    tally = Counter((str(entry.outcome), str(entry.code), entry.detail) for entry in inventory.files)
    return "\n".join([*lines, *(f"  {count} files {why}" for why, count in tally.items())])


# ---- right in the patient -------------------------------------------------------------------------------------------


def misfit(scan: Scan, truth: Truth) -> str:
    """How a volume differs from the truth; empty when it is right."""
    missing, extra = truth.codes - set(scan.codes), set(scan.codes) - truth.codes - truth.may
    if missing or extra:
        return f"flags {sorted(scan.codes)} instead of {sorted(truth.codes)}"
    return _misfit_straightened(scan, truth) if truth.straightened else _misfit_on_grid(scan, truth)


def _misfit_on_grid(scan: Scan, truth: Truth) -> str:
    """The same voxels in whatever order: each of the truth's lies within 0.1 mm of one of the scan's, and agrees."""
    if scan.hu.size != truth.hu.size:
        return f"{scan.hu.shape} voxels instead of {truth.hu.shape}"
    place = voxels_at(world_points(scan.affine, scan.hu.shape), truth.grid)
    nearest = np.round(place)
    off_mm = np.linalg.norm((place - nearest) @ truth.grid.affine[:3, :3].T, axis=-1).max()
    x, y, z = np.moveaxis(nearest.astype(int), -1, 0)
    inside = ((nearest >= 0) & (nearest < truth.hu.shape[::-1])).all()
    if off_mm > MM_TOLERANCE or not inside:
        return f"voxels lie up to {off_mm:.2f} mm off, or outside"
    if len(np.unique(np.ravel_multi_index((z, y, x), truth.hu.shape))) != truth.hu.size:
        return "voxels coincide"
    off_hu = np.abs(scan.hu - truth.hu[z, y, x]).max()
    return f"up to {off_hu:g} HU off" if off_hu > HU_TOLERANCE else ""


def _misfit_straightened(scan: Scan, truth: Truth) -> str:
    """On a straight grid that holds every slice whole: the phantom inside each, air where no slice was.

    The phantom is linear, so that interpolation between its voxels is exact. Within one pixel of a slice's edge the
    value mixes with what was vacated, and is not judged.
    """
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        return "the grid is not straight"
    corners = np.array([(x, y, z) for z in (0, truth.hu.shape[0] - 1) for y in (0, truth.hu.shape[1] - 1)
                        for x in (0, truth.hu.shape[2] - 1)])  # fmt: skip
    corners_mm = corners @ truth.grid.affine[:3, :3].T + truth.grid.affine[:3, 3]
    reach = (corners_mm - scan.affine[:3, 3]) @ np.linalg.inv(scan.affine[:3, :3]).T
    if (reach < -0.51).any() or (reach > np.array(scan.hu.shape[::-1]) - 0.49).any():
        return f"content is cut off: original corners at {reach.min(axis=0).round(2)}..{reach.max(axis=0).round(2)}"
    place = voxels_at(world_points(scan.affine, scan.hu.shape), truth.grid)
    apart_mm = abs(truth.grid.affine[:3, 2] @ truth.grid.normal)
    off_plane_mm = np.abs(place[..., 2] - np.round(place[..., 2])).max() * apart_mm
    if off_plane_mm > MM_TOLERANCE:
        return f"slices lie {off_plane_mm:.2f} mm off"
    last = np.array(truth.hu.shape[::-1])[:2] - 1
    within = ((place[..., :2] >= 0) & (place[..., :2] <= last)).all(axis=-1)
    vacated = ((place[..., :2] < -1) | (place[..., :2] > last + 1)).any(axis=-1)
    if within.sum() < 0.8 * truth.hu.size:
        return "most of the volume is gone"
    value = -1000 + place @ (11, 3, 40)
    off_hu = np.abs(scan.hu - value)[within].max()
    if off_hu > HU_TOLERANCE:
        return f"up to {off_hu:g} HU off inside the slices"
    return "vacated voxels are not air" if (scan.hu[vacated] != AIR_HU).any() else ""


def voxels_at(points: np.ndarray, grid: Grid) -> np.ndarray:
    """(..., 3) voxel coordinates (x, y, z) of patient points on this grid."""
    return (points - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T


# ---- what cases are made of -----------------------------------------------------------------------------------------


def ct_on(geometry: str, syntax: str = ExplicitVRLittleEndian, **settings: object) -> Ct:
    return Ct(grid=GRIDS[geometry], transfer_syntax=syntax, **settings)


def across(grid: Grid) -> list[float]:
    """ImageOrientationPatient of a slice at right angles to this grid's: rows the same, columns along the normal."""
    return [float(f"{value:.10f}") for value in (*grid.row, *-grid.normal)]


def object_of(sop_class: str, modality: str, number: int = 1) -> Dataset:
    """An object of the phantom's study that has no slice in it."""
    like = Ct().dataset(0)
    dataset = Dataset()
    for keyword in "PatientID PatientName PatientBirthDate PatientSex StudyInstanceUID StudyDate".split():
        dataset[keyword] = like[keyword]
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = sop_class, f"1.2.3.{number}", modality
    dataset.SeriesInstanceUID = f"1.2.3.77.{number}"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset
