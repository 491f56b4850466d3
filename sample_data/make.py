"""Writes the sample data: a miniature of the phantom hospital, small enough to be part of the repository.

    python sample_data/make.py [OUTPUT]        (OUTPUT: this folder)

`hospital/` holds six patients of three sites as DICOM (10 slices of 64 x 64 each), a seventh whose series has a
truncated file, and the usual junk: a localizer, a report, an MR image, a copy of a slice, a text file. `labels.csv`
holds their labels, `ct.nii.gz` the first patient once more, as NIfTI. Nobody's images: `medvit.io.phantom` draws them,
and the same bytes come out every time (a test compares them).
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medvit.io.phantom import make_patients, render, write_hospital
from medvit.records import ReasonCode

MATRIX, SLICES = 64, 10


def write_nifti(path: Path, hu: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]) -> None:
    """Write a volume (Z, Y, X) with its LPS affine; NIfTI world coordinates are RAS and its arrays (X, Y, Z)."""
    image = nib.Nifti1Image(hu.T.astype(np.int16), np.diag([-1, -1, 1, 1]) @ affine)
    image.header.set_xyzt_units("mm")
    # No time and no file name in the gzip header, and stored blocks: compressed ones differ between zlib versions.
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=0, fileobj=file, mtime=0) as stream:
        stream.write(image.to_bytes())


def main(output: Path) -> None:
    """Write everything below `output`."""
    patients = make_patients(6, seed=1)
    hospital = write_hospital(
        output / "hospital",
        patients,
        damage=(ReasonCode.PIXEL_TRUNCATED,),
        matrix=MATRIX,
        slices=SLICES,
    )
    write_nifti(output / "ct.nii.gz", *render(patients[0], matrix=MATRIX, slices=SLICES))
    print(f"{len(hospital.series)} usable series, {len(hospital.planted)} planted faults in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
