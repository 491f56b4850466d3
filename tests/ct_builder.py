"""A known-answer CT for tests: HU = -1000 + 11 col + 3 row + 40 slice on 24 x 20 x 12 voxels of 0.9 x 0.7 x 2.5 mm.

Every voxel differs from its neighbours along each axis by another amount, so that a flip, a transposition, a shift by
one voxel or a lost slice changes the value at some point of the patient. Compare in patient space, never by index.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

COLUMNS, ROWS, SLICES = 24, 20, 12
SPACING_MM = (0.9, 0.7, 2.5)  # between columns, rows, slices
CT = "1.2.840.10008.5.1.4.1.1.2"
ROOT_UID = "1.2.826.0.1.3680043.8.498"

Edit = Callable[[Dataset, int], None]


def phantom_hu(slices: int = SLICES) -> np.ndarray:
    z, y, x = np.indices((slices, ROWS, COLUMNS))
    return -1000 + 11 * x + 3 * y + 40 * z


@dataclass(frozen=True)
class Grid:
    """Where the voxels lie: unit directions of rows and columns, step between slices (None: along the normal)."""

    row: tuple[float, ...] = (1.0, 0.0, 0.0)
    column: tuple[float, ...] = (0.0, 1.0, 0.0)
    step: tuple[float, ...] | None = None
    origin: tuple[float, ...] = (-12.5, -40.0, 107.25)

    @property
    def affine(self) -> np.ndarray:
        x_mm, y_mm, z_mm = SPACING_MM
        affine = np.eye(4)
        affine[:3, 0] = np.array(self.row) * x_mm
        affine[:3, 1] = np.array(self.column) * y_mm
        affine[:3, 2] = np.cross(self.row, self.column) * z_mm if self.step is None else self.step
        affine[:3, 3] = self.origin
        return affine


def _turned(degrees: float) -> Grid:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return Grid(row=(c, s, 0), column=(-s * c, c * c, s))


GRIDS = {
    "axial": Grid(),
    "head_last": Grid(step=(0, 0, -2.5)),
    "prone": Grid(row=(-1, 0, 0), column=(0, -1, 0)),
    "coronal": Grid(row=(1, 0, 0), column=(0, 0, -1)),
    "sagittal": Grid(row=(0, 1, 0), column=(0, 0, -1)),
    "oblique": _turned(17.0),
}
TILTED = Grid(step=(0, 2.5 * float(np.sin(np.radians(15))), 2.5 * float(np.cos(np.radians(15)))))


@dataclass
class Ct:
    """How to write one series; `edit(dataset, index)` runs last on each slice, before it is written."""

    grid: Grid = field(default_factory=Grid)
    hu: np.ndarray = field(default_factory=phantom_hu)
    uid: int = 1
    study: int = 1
    patient: str = "Mueller-0815"
    signed: bool = False
    bits_stored: int = 12
    slopes: Sequence[float] = (1.0,)
    intercept: float = -1024.0
    transfer_syntax: str = ExplicitVRLittleEndian
    edit: Edit | None = None

    def dataset(self, index: int) -> Dataset:
        slope = self.slopes[index % len(self.slopes)]
        stored = np.round((self.hu[index] - self.intercept) / slope).astype(np.int32)
        dataset = Dataset()
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SOPClassUID = CT
        dataset.SOPInstanceUID = f"{ROOT_UID}.{self.study}.{self.uid}.{index + 1}"
        dataset.StudyInstanceUID = f"{ROOT_UID}.{self.study}"
        dataset.SeriesInstanceUID = f"{ROOT_UID}.{self.study}.{self.uid}"
        dataset.FrameOfReferenceUID = f"{ROOT_UID}.{self.study}.99"
        dataset.Modality, dataset.Manufacturer, dataset.InstitutionName = "CT", "Acme", "North"
        dataset.PatientID, dataset.PatientName = self.patient, "Mueller^Anna"
        dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = "19600102", "F", "061Y"
        dataset.StudyDate, dataset.SliceThickness, dataset.InstanceNumber = "20210304", 2.5, index + 1
        dataset.AcquisitionNumber = 1
        dataset.ImageOrientationPatient = [float(f"{v:.10f}") for v in (*self.grid.row, *self.grid.column)]
        dataset.ImagePositionPatient = [float(f"{v:.8f}") for v in (self.grid.affine @ (0, 0, index, 1))[:3]]
        dataset.PixelSpacing = [SPACING_MM[1], SPACING_MM[0]]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = stored.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, self.bits_stored, self.bits_stored - 1
        dataset.PixelRepresentation = int(self.signed)
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = slope, self.intercept, "HU"
        dataset.PixelData = (stored & 0xFFFF).astype("<u2").tobytes()
        dataset["PixelData"].VR = "OW"
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = self.transfer_syntax
        return dataset

    def write(self, folder: Path, name: str = "IM{:04d}.dcm", only: Sequence[int] | None = None) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index in range(len(self.hu)) if only is None else only:
            dataset = self.dataset(index)
            if self.edit is not None:
                self.edit(dataset, index)
            paths.append(folder / name.format(index))
            save(dataset, paths[-1])
        return paths


def save(dataset: Dataset, path: Path) -> None:
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    elif syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, "1.2.840.10008.1.2.1.99"):
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)


def world_points(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(Z, Y, X, 3) patient coordinates, mm."""
    z, y, x = np.indices(shape)
    return np.stack([x, y, z], axis=-1) @ affine[:3, :3].T + affine[:3, 3]


def phantom_at(points: np.ndarray, grid: Grid) -> np.ndarray:
    """The HU that the phantom on this grid has at patient points (..., 3)."""
    inverse = np.linalg.inv(grid.affine)
    return points @ inverse[:3, :3].T @ (11, 3, 40) + inverse[:3, 3] @ (11, 3, 40) - 1000


def assert_is_phantom(scan, grid: Grid | None = None, hu: float = 0.5) -> None:
    """Every voxel of the scan has the value that the phantom has at that point of the patient."""
    assert scan.hu.size == ROWS * COLUMNS * SLICES
    points = world_points(scan.affine, scan.hu.shape)
    np.testing.assert_allclose(scan.hu, phantom_at(points, grid or Grid()), atol=hu)
