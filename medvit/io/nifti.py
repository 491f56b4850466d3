"""NIfTI (nibabel), NRRD and MetaImage (SimpleITK) -> the same Scan as from DICOM.

NIfTI goes through nibabel because SimpleITK reads truncated and CRC-broken files silently. Values are taken as HU:
these formats do not say. NIfTI's patient system is RAS, ours LPS: the first two rows of the affine change sign.
"""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from medvit.io.dicom import HU_RANGE_LIMIT
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
    if not path.is_file():
        raise ScanError(ReasonCode.IO_ERROR, "no such file", (name,))
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        values, affine, codes = _read_nifti(path, name)
    else:
        values, affine, codes = _read_itk(path, name)
    if not np.isfinite(values).all():
        raise ScanError(
            ReasonCode.NIFTI_NONFINITE, f"{int((~np.isfinite(values)).sum())} voxels are NaN or infinite", (name,)
        )
    _check_orthogonal(affine, name)
    low, high = float(values.min()), float(values.max())
    if low == high or high - low > HU_RANGE_LIMIT:
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, f"values from {low:g} to {high:g}", (name,))
    return Scan(hu=values.astype(np.float32), affine=affine, codes=codes, files=(name,))


def _read_nifti(
    path: Path, name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[ReasonCode, ...]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Any = nib.load(path)
            _check_array(image, _stream_length(path), name)
            values = np.asarray(image.dataobj, dtype=np.float64)
            # nibabel forgets the slope it has applied, so the header is read once more
            with image.file_map["image"].get_prepare_fileobj("rb") as stream:
                slope = float(type(image.header).from_fileobj(stream)["scl_slope"])
    except ScanError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(
            ReasonCode.GZIP_CORRUPT, f"compressed stream is damaged ({type(error).__name__})", (name,)
        ) from None
    except Exception as error:  # noqa: BLE001  damaged headers raise HeaderDataError, OverflowError and more
        raise ScanError(
            ReasonCode.PIXEL_TRUNCATED, f"not readable as NIfTI ({type(error).__name__})", (name,)
        ) from None
    # 0 and NaN mean unscaled, and only a written 0 is worth a word
    codes = (ReasonCode.NIFTI_SCALE,) if slope == 0 else ()
    return values.reshape(values.shape[:3]).transpose(2, 1, 0), RAS_TO_LPS @ _agreed_affine(image, name), codes


def _stream_length(path: Path) -> int:
    """Bytes in the file; a gz stream is read to its end, for only there is its checksum."""
    if not path.name.lower().endswith(".gz"):
        return path.stat().st_size
    length = 0
    with gzip.open(path) as stream:
        while block := stream.read(1 << 20):
            length += len(block)
    return length


def _check_array(image: Any, length: int, name: str) -> None:
    """One scalar volume that the stream really holds: nibabel would allocate whatever the header claims."""
    shape, dtype = image.shape, image.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape[3:]) != 1 or dtype.kind not in "iuf":
        raise ScanError(ReasonCode.NIFTI_NDIM, f"shape {shape} of {dtype}", (name,))
    needed = int(image.dataobj.offset) + math.prod(shape) * dtype.itemsize
    if length < needed:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{length} bytes where the header needs {needed}", (name,))


def _agreed_affine(image: Any, name: str) -> npt.NDArray[np.float64]:
    """The one affine that sform and qform tell, where set; readers differ when they disagree or are both unset."""
    try:
        qform, qcode = image.header.get_qform(coded=True)
    except ValueError:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "the quaternion of the qform is no rotation", (name,)) from None
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
        reader: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]  # SimpleITK ships no types
        reader.SetFileName(name)
        reader.ReadImageInformation()
        dimensions, components = reader.GetDimension(), reader.GetNumberOfComponents()
        if dimensions != 3 or components != 1:  # asked before reading: a cast would make colours grey
            raise ScanError(ReasonCode.NIFTI_NDIM, f"{dimensions} dimensions, {components} components", (name,))
        reader.SetOutputPixelType(sitk.sitkFloat64)
        image: Any = reader.Execute()
    except (RuntimeError, MemoryError):
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, "not readable as NRRD or MetaImage", (name,)) from None
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
