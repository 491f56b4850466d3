"""`read`: the one door from files to a Scan, whatever their format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medvit.io import dicom, folder, nifti
from medvit.records import Scan, ScanError, UsageError


def read(source: folder.Series | str | Path, *, assume_hu: bool = False) -> Scan:
    """Read one CT series into Hounsfield units with geometry.

    Args:
        source: a series of an inventory, a DICOM, NIfTI, NRRD or MetaImage file, or a folder with exactly one series.
        assume_hu: take values without rescale tags for HU, and flag them (a series carries its own setting).

    Raises:
        ScanError: the series cannot be used; the code says why.
        UsageError: the folder is missing or empty.
    """
    if isinstance(source, folder.Series):
        return _read_listed(source)
    path = Path(source)
    if path.is_dir():
        return _read_listed(_only_series(folder.scan_folder(path, assume_hu=assume_hu)))
    return read_files([path], assume_hu=assume_hu)


def read_files(paths: Sequence[Path], *, assume_hu: bool = False, part: int = 0) -> Scan:
    """Read one volume file, or the DICOM files of one series in any order.

    Args:
        paths: of one series.
        assume_hu: as `read`.
        part: which volume, where the files hold several (`Series.part`).

    Raises:
        ScanError: as `read`.
    """
    if nifti.is_volume_file(paths[0]):
        return nifti.read_volume(paths[0])
    return dicom.read_series(paths, assume_hu=assume_hu)


def _read_listed(series: folder.Series) -> Scan:
    if not series.usable:
        raise ScanError(series.codes[0], series.detail, series.files)
    return read_files([series.root / name for name in series.files], assume_hu=series.assume_hu)


def _only_series(inventory: folder.Inventory) -> folder.Series:
    usable = [series for series in inventory.series if series.usable]
    if len(usable) == 1:
        return usable[0]
    faulty = [series for series in inventory.series if series.codes]
    if not usable and faulty:
        return faulty[0]
    raise UsageError(
        f"{inventory.root}: expected one CT series, saw {len(usable)}. Use scan_folder and read the series you want."
    )
