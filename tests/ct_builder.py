"""A known-answer CT for tests: HU = -1000 + 11 col + 3 row + 40 slice on 24 x 20 x 12 voxels of 0.9 x 0.7 x 2.5 mm.

Every voxel differs from its neighbours along each axis by another amount, so that a flip, a transposition, a shift by
one voxel or a lost slice changes the value at some point of the patient. Compare in patient space, never by index.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jpeg_lossless
import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.config import IGNORE, settings
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSNearLossless,
)

COLUMNS, ROWS, SLICES = 24, 20, 12
SPACING_MM = (0.9, 0.7, 2.5)  # between columns, rows, slices
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_CONVERTED_CT = "1.2.840.10008.5.1.4.1.1.2.2"
ROOT_UID = "1.2.826.0.1.3680043.8.498"
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)

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

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.row, self.column)

    def tilted(self, degrees: float, about: str = "row") -> "Grid":
        """The same slices with a gantry turned about their row or column direction: each is moved in its own plane."""
        step = self.affine[:3, 2]
        length, angle = np.linalg.norm(step), np.radians(degrees)
        drift = np.array(self.column if about == "row" else self.row)
        return replace(self, step=tuple(step * np.cos(angle) + drift * length * np.sin(angle)))

    def thinned(self, every: int) -> "Grid":
        """The grid of every second, third... slice."""
        return replace(self, step=tuple(self.affine[:3, 2] * every))

    def moved(self, *by_mm: float) -> "Grid":
        return replace(self, origin=tuple(np.add(self.origin, by_mm)))


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
    """How to write one series.

    `edit(dataset, index)` runs last on each slice before its pixels are encoded, `damage(dataset, index)` after.
    """

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
    damage: Edit | None = None

    def but(self, **changes: Any) -> "Ct":
        return replace(self, **changes)

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
            save(dataset, paths[-1], lambda encoded, index=index: self.damage and self.damage(encoded, index))
        return paths


def save(dataset: Dataset, path: Path, damage: Callable[[Dataset], Any] = lambda dataset: None) -> None:
    """Encode the pixels as the transfer syntax says, damage the result, write it whatever it has become."""
    syntax = dataset.file_meta.TransferSyntaxUID
    encode(dataset, syntax)
    meta = dataset.file_meta
    meta.FileMetaInformationGroupLength, meta.FileMetaInformationVersion = 0, b"\0\1"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.ImplementationClassUID = f"{ROOT_UID}.0"
    dataset.preamble = bytes(128)
    native = syntax if syntax in NATIVE else ExplicitVRLittleEndian
    before = settings.writing_validation_mode
    settings.writing_validation_mode = IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # illegal on purpose
            damage(dataset)
            # as if it had been read so: what is illegal is written byte for byte, not parsed once more
            dataset.set_original_encoding(native.is_implicit_VR, native.is_little_endian, dataset._character_set)
            dataset.save_as(path, implicit_vr=native.is_implicit_VR, little_endian=native.is_little_endian)
    finally:
        settings.writing_validation_mode = before


def encode(dataset: Dataset, syntax: str) -> None:
    """Replace native little-endian pixel data, signed or not, by what the transfer syntax asks for."""
    if "PixelData" not in dataset or syntax in (*NATIVE, None):
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        return
    frames = PLANE_ENCODERS.get(syntax)
    if frames is not None:
        planes = np.frombuffer(dataset.PixelData, "<u2").reshape(-1, dataset.Rows, dataset.Columns)
        dataset.PixelData = encapsulate([frames(plane, dataset) for plane in planes])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        return
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.compress(syntax, generate_instance_uid=False, **({"jls_error": 2} if syntax == JPEGLSNearLossless else {}))


def _jpeg_lossless(plane: np.ndarray, dataset: Dataset) -> bytes:
    return jpeg_lossless.encode(plane & ((1 << dataset.BitsStored) - 1), dataset.BitsStored)


def jpeg_2000(plane: np.ndarray, dataset: Dataset, signed: bool | None = None, **options: Any) -> bytes:
    """A codestream of the depth and sign that the header says; few resolutions, because the slice is small.

    The encoder writes 16 unsigned bits, which it codes as value - 2**15; a decoder adds half the range of the depth
    in the SIZ segment, nothing where that is signed (ISO/IEC 15444-1 G.1). So shift, and correct the segment.
    """
    bits, signed = dataset.BitsStored, bool(dataset.PixelRepresentation) if signed is None else signed
    values = plane.astype(np.int32) & ((1 << bits) - 1)
    if signed:
        values = (values ^ (1 << (bits - 1))) - (1 << (bits - 1))
    level = 0 if signed else 1 << (bits - 1)
    stream = io.BytesIO()
    picture = Image.fromarray((values - level + 32768).astype(np.uint16))
    picture.save(stream, "JPEG2000", no_jp2=True, num_resolutions=2, irreversible=False, **options)
    code = bytearray(stream.getvalue())
    code[SIZ_DEPTH] = signed << 7 | (bits - 1)
    return bytes(code) + b"\0" * (len(code) % 2)


def _jpeg_2000_lossy(plane: np.ndarray, dataset: Dataset) -> bytes:
    return jpeg_2000(plane, dataset, quality_mode="rates", quality_layers=[3])


PLANE_ENCODERS = {
    JPEGLosslessSV1: _jpeg_lossless,
    JPEG2000Lossless: jpeg_2000,
    JPEG2000: _jpeg_2000_lossy,
}
SIZ_WIDTH, SIZ_HEIGHT, SIZ_DEPTH = 8, 12, 42
"""Offsets in a JPEG 2000 codestream: SOC, then the SIZ segment (ISO/IEC 15444-1 A.5.1)."""


# ---- edits ----------------------------------------------------------------------------------------------------------


def put(dataset: Dataset, keyword: str, value: Any, vr: str = "") -> None:
    """Set a tag to a value, legal or not, under its own or another VR; None deletes it."""
    if value is None:
        dataset.pop(tag_for_keyword(keyword), None)
    elif isinstance(value, bytes):
        tag, vr = Tag(keyword), vr or dictionary_VR(keyword)
        dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    else:
        vr = vr or dictionary_VR(keyword)
        dataset[keyword] = DataElement(tag_for_keyword(keyword), vr, value, validation_mode=IGNORE)


def change(at: int | Iterable[int] | None = None, vr: str = "", **tags: Any) -> Edit:
    """An edit that sets tags on one slice, on several or on all; a callable value is called with the index."""
    chosen = {at} if isinstance(at, int) else None if at is None else set(at)

    def edit(dataset: Dataset, index: int) -> None:
        if chosen is None or index in chosen:
            for keyword, value in tags.items():
                put(dataset, keyword, value(index) if callable(value) else value, vr)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(dataset: Dataset, index: int) -> None:
        for one in edits:
            one(dataset, index)

    return edit


# ---- multi-frame ----------------------------------------------------------------------------------------------------


@dataclass
class EnhancedCt:
    """The same series as one multi-frame object with shared and per-frame functional groups (PS3.3 A.38.1).

    Attributes:
        ct: the slices, one frame each.
        frames: slice index of each frame, in file order.
        phases: of each frame, its TemporalPositionIndex; None: no temporal dimension.
        shared: which groups stand once for all frames: measures, orientation, rescale.
        without: groups left out altogether: those, and position.
        edit: runs on the whole dataset before its pixels are encoded; `damage` after.
    """

    ct: Ct = field(default_factory=Ct)
    frames: Sequence[int] = tuple(range(SLICES))
    phases: Sequence[int] | None = None
    shared: Sequence[str] = ("measures", "orientation", "rescale")
    without: Sequence[str] = ()
    sop_class: str = ENHANCED_CT
    edit: Callable[[Dataset], Any] = lambda dataset: None
    damage: Callable[[Dataset], Any] = lambda dataset: None

    def dataset(self) -> Dataset:
        slices = [self.ct.dataset(index) for index in self.frames]
        whole = self.ct.dataset(0)
        for keyword in (
            "ImageOrientationPatient ImagePositionPatient PixelSpacing SliceThickness RescaleSlope RescaleIntercept "
            "RescaleType AcquisitionNumber"
        ).split():
            del whole[keyword]
        whole.SOPClassUID, whole.NumberOfFrames = self.sop_class, len(slices)
        whole.SOPInstanceUID = f"{whole.SeriesInstanceUID}.1000"
        whole.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        whole.SharedFunctionalGroupsSequence = [self._groups(slices[0], self.shared)]
        own = [name for name in ("measures", "orientation", "rescale", "position") if name not in self.shared]
        whole.PerFrameFunctionalGroupsSequence = [self._groups(one, own, n) for n, one in enumerate(slices)]
        whole.PixelData = b"".join(one.PixelData for one in slices)
        whole["PixelData"].VR = "OW"
        return whole

    def _groups(self, one: Dataset, names: Sequence[str], frame: int | None = None) -> Dataset:
        groups = Dataset()
        for name in names:
            if name not in self.without:
                sequence, keywords = GROUPS[name]
                item = Dataset()
                for keyword in keywords:
                    item[keyword] = one[keyword]
                setattr(groups, sequence, [item])
        if frame is not None:
            content = Dataset()
            content.StackID, content.InStackPositionNumber = "1", self.frames[frame] + 1
            content.FrameAcquisitionNumber = 1
            if self.phases is not None:
                content.TemporalPositionIndex = self.phases[frame]
            groups.FrameContentSequence = [content]
        return groups

    def write(self, folder: Path, name: str = "multiframe.dcm") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        dataset = self.dataset()
        self.edit(dataset)
        save(dataset, folder / name, self.damage)
        return folder / name


GROUPS = {
    "measures": ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness")),
    "orientation": ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
    "rescale": ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept", "RescaleType")),
    "position": ("PlanePositionSequence", ("ImagePositionPatient",)),
}
"""Functional groups by name: sequence keyword and the attributes in its one item (PS3.3 C.7.6.16.2)."""


# ---- the known answer -----------------------------------------------------------------------------------------------


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
