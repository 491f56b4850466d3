"""`read`: the one door from files to a Scan, whatever their format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medvit.io import dicom, folder, nifti, sandbox
from medvit.io.inventory import Inventory, Series, stamp_of
from medvit.records import ReasonCode, Scan, ScanError, UsageError


def read(source: Series | str | Path, *, assume_hu: bool = False) -> Scan:
    """Read one CT series into Hounsfield units with geometry.

    Args:
        source: a series of an inventory, a DICOM, NIfTI, NRRD or MetaImage file, or a folder with exactly one series.
        assume_hu: take values without rescale tags for HU, and flag them (a series carries its own setting).

    Raises:
        ScanError: the series cannot be used; the code says why.
        UsageError: the folder is missing or empty.
    """
    if isinstance(source, Series):
        return _read_listed(source)
    path = Path(source)
    if "\0" in str(source):
        raise ScanError(ReasonCode.IO_ERROR, "no such file")
    if path.is_dir():
        return _read_listed(_only_series(folder.scan_folder(path, assume_hu=assume_hu)))
    return read_files([path], assume_hu=assume_hu)


def read_files(paths: Sequence[Path], *, assume_hu: bool = False, part: int | None = None) -> Scan:
    """Read one volume file, or the DICOM files of one series in any order.

    Args:
        paths: of one series.
        assume_hu: as `read`.
        part: which volume, where the files hold several (`Series.part`); None: they hold one.

    Raises:
        ScanError: as `read`.
    """
    if not paths:
        raise UsageError("expected the files of one series, saw none.")
    if nifti.is_volume_file(paths[0].name):
        return _read_volume_file(paths)
    return dicom.read_series(paths, assume_hu=assume_hu, part=part)


def _read_volume_file(paths: Sequence[Path]) -> Scan:
    """One volume file; a second path may only be that of its detached pixels."""
    header = nifti.examine(paths[0])
    if any(path.absolute() != header.pixels.path.absolute() for path in paths[1:]):
        raise UsageError(f"expected one volume file, saw {len(paths)} files. Read each volume by itself.")
    hu, codes = sandbox.fill_volume(paths[0], header.shape)
    return Scan(hu=hu, affine=header.affine, codes=codes, files=tuple(map(str, paths)))


def _read_listed(series: Series) -> Scan:
    if not series.usable:
        raise ScanError(series.codes[0], series.detail, series.files)
    paths = [series.root / name for name in series.files]
    check_unchanged(series)
    scan = read_files(paths, assume_hu=series.assume_hu, part=series.part)
    if scan.hu.shape != series.shape:
        raise ScanError(ReasonCode.INCOMPLETE, f"{scan.hu.shape} where {series.shape} was listed", series.files)
    codes = tuple(dict.fromkeys((*series.codes, *scan.codes)))  # a phase that is read alone does not know of the others
    return replace(scan, codes=codes, header=replace(scan.header, phase=series.header.phase))


def check_unchanged(series: Series) -> None:
    """Refuse a series whose files are not what they were when it was listed: it is still arriving.

    Raises:
        ScanError: `INCOMPLETE`, or `IO_ERROR` where a file is gone.
    """
    found = []
    for name in series.files:
        try:
            status = (series.root / name).stat(follow_symlinks=False)
        except OSError:
            raise ScanError(ReasonCode.IO_ERROR, "a file of the series is gone", (name,)) from None
        found.append((name, status.st_size, status.st_mtime_ns))
    if series.stamp and stamp_of(found) != series.stamp:
        raise ScanError(ReasonCode.INCOMPLETE, "files changed since the folder was listed", series.files)


def _only_series(inventory: Inventory) -> Series:
    usable = [series for series in inventory.series if series.usable]
    bad = [entry for entry in inventory.files if entry.outcome.bad]
    if len(usable) == 1 and bad:
        # it may be a slice of the series: who wants it all the same lists the folder and sees the account
        detail = f"{len(bad)} files beside the series cannot be used, the first for: {bad[0].detail}"
        raise ScanError(bad[0].code or ReasonCode.IO_ERROR, detail, tuple(entry.path for entry in bad))
    if len(usable) == 1:
        return usable[0]
    faulty = [series for series in inventory.series if series.codes]
    if not usable and faulty:
        return faulty[0]
    raise UsageError(
        f"{inventory.root}: expected one CT series, saw {len(usable)}. Use scan_folder and read the series you want."
    )
