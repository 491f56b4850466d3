"""NIfTI (nibabel), NRRD and MetaImage (SimpleITK) -> the same Scan as from DICOM.

NIfTI goes through nibabel because SimpleITK reads truncated and CRC-broken files silently. Values are taken as HU:
these formats do not say. NIfTI's patient system is RAS, ours LPS: the first two rows of the affine change sign.
"""

from __future__ import annotations

import gzip
import warnings
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError

from medvit.records import ReasonCode, Scan, ScanError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE_TOLERANCE_MM = 0.1
"""Largest distance between the corners that qform and sform give."""

SHEAR_TOLERANCE = 1e-3


def is_volume_file(path: Path) -> bool:
    """Whether the name says NIfTI, NRRD or MetaImage."""
    return path.name.lower().endswith(NIFTI_SUFFIXES + ITK_SUFFIXES)


def read_volume(path: Path) -> Scan:
    """Read one volume file.

    Raises:
        ScanError: `GZIP_CORRUPT`, `PIXEL_TRUNCATED`, `IO_ERROR`, or one of the `NIFTI_...` codes.
    """
    name = str(path)
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        values, affine, codes = _read_nifti(path, name)
    else:
        values, affine, codes = _read_itk(path, name)
    if not np.isfinite(values).all():
        raise ScanError(
            ReasonCode.NIFTI_NONFINITE, f"{int((~np.isfinite(values)).sum())} voxels are NaN or infinite", (name,)
        )
    _check_orthogonal(affine, name)
    if values.min() == values.max():
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, f"all voxels are {values.min():g}", (name,))
    return Scan(hu=values.astype(np.float32), affine=affine, codes=codes, files=(name,))


def _read_nifti(
    path: Path, name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[ReasonCode, ...]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Any = nib.load(path)
            _drain(path)
            values = np.asarray(image.dataobj, dtype=np.float64)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(
            ReasonCode.GZIP_CORRUPT, f"compressed stream is damaged ({type(error).__name__})", (name,)
        ) from None
    except (OSError, ImageFileError, ValueError, TypeError) as error:
        raise ScanError(
            ReasonCode.PIXEL_TRUNCATED, f"not readable as NIfTI ({type(error).__name__})", (name,)
        ) from None
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise ScanError(ReasonCode.NIFTI_NDIM, f"shape {values.shape}", (name,))
    slope = float(image.header["scl_slope"])
    # nibabel has applied the slope; 0 and NaN mean unscaled, and only a written 0 is worth a word
    codes = (ReasonCode.NIFTI_SCALE,) if slope == 0 else ()
    return values.transpose(2, 1, 0), RAS_TO_LPS @ _agreed_affine(image, name), codes


def _drain(path: Path) -> None:
    """Read a gz stream to its end: only there is its checksum."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            while stream.read(1 << 20):
                pass


def _agreed_affine(image: Any, name: str) -> npt.NDArray[np.float64]:
    """The one affine that sform and qform tell, where set; readers differ when they disagree or are both unset."""
    qform, qcode = image.header.get_qform(coded=True)
    sform, scode = image.header.get_sform(coded=True)
    if not qcode and not scode:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "neither qform nor sform is set", (name,))
    if qcode and scode:
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*image.shape[:3], 1]
        apart = float(np.abs(corners @ (np.asarray(qform) - np.asarray(sform)).T).max())
        if apart > AFFINE_TOLERANCE_MM:
            raise ScanError(ReasonCode.NIFTI_AFFINE, f"qform and sform are up to {apart:.1f} mm apart", (name,))
    return np.asarray(sform if scode else qform, dtype=np.float64)


def _read_itk(path: Path, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[ReasonCode, ...]]:
    try:
        image: Any = sitk.ReadImage(name, sitk.sitkFloat64)
    except RuntimeError:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, "not readable as NRRD or MetaImage", (name,)) from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(ReasonCode.NIFTI_NDIM, f"{image.GetDimension()} dimensions", (name,))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine, ()


def _check_orthogonal(affine: npt.NDArray[np.float64], name: str) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (spacing <= 0).any():
        raise ScanError(ReasonCode.NIFTI_AFFINE, "the affine is singular", (name,))
    axes = affine[:3, :3] / spacing
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if shear > SHEAR_TOLERANCE:
        raise ScanError(ReasonCode.NIFTI_SHEAR, f"axes are {shear:.3f} from orthogonal", (name,))
