"""medvit's reading for any MONAI pipeline: validated, in Hounsfield units, refusing what it does not understand.

    LoadImaged("image", reader=MedvitReader)                  # a file, a folder with one series, a list of its files
    LoadImaged("image", reader="medvit.data.MedvitReader")    # the same by name, for a MONAI bundle
    LoadImaged("image", reader=MedvitReader, expanduser=False)  # a Series of `scan_folder` as well

The short string "MedvitReader" is not known to MONAI, which looks for short names among its own readers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.data.image_reader import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from medvit.io import Series, read, read_files
from medvit.io.nifti import is_volume_file
from medvit.records import Scan, UsageError

Source = str | Path | Series
Sources = Sequence[Source] | Source
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class MedvitReader(ImageReader):
    """`medvit.io.read` as a MONAI reader of CT: DICOM series, NIfTI, NRRD, MetaImage.

    What medvit refuses stays refused: `ScanError`, with its code, out of `LoadImaged`; inside a `Compose` it is the
    cause of MONAI's own RuntimeError.
    """

    def verify_suffix(self, filename: Sources) -> bool:  # type: ignore[override]  # MONAI knows paths only
        """Whether each is a series, a folder, a volume file or a DICOM file, whose name says nothing.

        MONAI asks when it chooses among its registered readers (`LoadImage().register(MedvitReader())`).
        """
        return all(_is_ours(source) for source in ensure_tuple(filename))

    def read(self, data: Sources) -> tuple[Source, ...]:  # type: ignore[override]  # and there are no options
        """Note what is to be read; it is opened in `get_data`.

        MONAI answers an error raised here by trying its other readers, and they would take what medvit refuses.

        Args:
            data: a path (volume file, DICOM file, folder with one series), a series, or the DICOM files of one series.
        """
        sources: tuple[Source, ...] = ensure_tuple(data)
        return sources

    def get_data(self, img: tuple[Source, ...]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Read it: HU (X, Y, Z), and metadata as of `to_monai`.

        Raises:
            ScanError: the series cannot be used; the code says why.
            UsageError: a folder without exactly one series, or several volumes at once.
        """
        return to_monai(_read(img))


def to_monai(scan: Scan) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """A scan in MONAI's convention.

    Returns:
        HU (X, Y, Z), a read-only view (MONAI copies it into its tensor), and metadata: `affine` and `original_affine`,
        voxel (x, y, z, 1) -> patient RAS in mm; `spatial_shape`; `codes`, the flags with spaces between;
        `acquisition`, how it was scanned. No identity. All of it collates, whatever the scans of a batch are.
    """
    affine = LPS_TO_RAS @ scan.affine
    hu = scan.hu.transpose(2, 1, 0)
    metadata: dict[str, Any] = {
        MetaKeys.AFFINE: affine,
        MetaKeys.ORIGINAL_AFFINE: affine.copy(),
        MetaKeys.SPACE: SpaceKeys.RAS.value,
        MetaKeys.SPATIAL_SHAPE: np.array(hu.shape),
        MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),  # MONAI's way to say that there is none
        "codes": " ".join(scan.codes),
        "acquisition": dict(scan.header.acquisition()),
    }
    return hu, metadata


def _is_ours(source: Source) -> bool:
    if isinstance(source, Series):
        return True
    path = Path(source)
    if path.is_dir() or is_volume_file(path.name):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"  # PS3.10 7.1
    except OSError:
        return False


def _read(sources: tuple[Source, ...]) -> Scan:
    if len(sources) == 1:
        return read(sources[0])
    paths = [Path(source) for source in sources if not isinstance(source, Series)]
    if len(paths) < len(sources) or any(path.is_dir() or is_volume_file(path.name) for path in paths):
        raise UsageError(
            f"expected one volume, saw {len(sources)} sources that are not the DICOM files of one series. "
            "Load each volume under a key of its own, or as a case of its own."
        )
    return read_files(paths)
