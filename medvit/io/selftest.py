"""Does this installation put voxels where they belong? A phantom with a known answer, and SimpleITK as a second reader.

Left and right were swapped in the field by updates of readers, not by scanners: so the check runs on the machine that
will be used, through the same door as every scan.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from medvit.io import phantom
from medvit.io.geometry import Floats
from medvit.io.reader import read
from medvit.records import ReasonCode, Scan, ScanError


def check_orientation() -> None:
    """Write a prone synthetic CT, read it, and compare every voxel and its place with what was written.

    Raises:
        ScanError: `ORIENT_SELFTEST`: this installation must not be used. Other codes: it could not be read at all.
    """
    patient = phantom.make_patients(1, seed=0)[0]
    hu, affine = phantom.turn_prone(*phantom.render(patient, matrix=32, slices=4))
    with tempfile.TemporaryDirectory() as folder:
        paths = phantom.write_series(Path(folder), hu, affine, patient)
        scan = read(folder)
        if not _same_place(scan.affine, affine) or np.abs(scan.hu - hu).max() > 1:
            raise ScanError(ReasonCode.ORIENT_SELFTEST, "the phantom is not where it was written")
        if not agrees_with_simpleitk(scan, paths):
            raise ScanError(ReasonCode.ORIENT_SELFTEST, "SimpleITK sees another volume than medvit")


def _same_place(one: Floats, other: Floats) -> bool:
    return bool(np.abs(one - other).max() < 1e-3)


def agrees_with_simpleitk(scan: Scan, paths: list[Path]) -> bool:
    """Whether GDCM through SimpleITK reads the same values at the same places."""
    import SimpleITK as sitk  # noqa: PLC0415  a third of a second that reading need not pay

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(paths[0].parent))  # type: ignore[no-untyped-call]
    image: Any = sitk.ReadImage(names)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    values = sitk.GetArrayFromImage(image)
    same = values.shape == scan.hu.shape and np.abs(values - scan.hu).max() <= 1
    return bool(same) and _same_place(affine, scan.affine)
