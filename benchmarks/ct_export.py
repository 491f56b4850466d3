"""What the readers are timed on: one series in two encodings, and export folders of many small files.

A real series is better than a synthetic one; without `--data` or MEDVIT_REAL_DATA the phantom stands in, so that the
benchmark runs anywhere. The files of an export are small in pixels and real in headers: about a hundred elements and
5 KB, private ones among them, because that is what listing a folder reads.
"""

import io
import os
import shutil
from pathlib import Path

import numpy as np
from ct_readers import Source
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless

import medvit.io
from medvit.io import phantom

SLICES_OF_A_SERIES = 200
PLACE = {
    "study": b"1.2.826.0.1.3680043.8.498.1000000001",
    "series": b"1.2.826.0.1.3680043.8.498.1000000002",
    "instance": b"1.2.826.0.1.3680043.8.498.1000000003",
    "frame": b"1.2.826.0.1.3680043.8.498.1000000004",
    "patient": b"ID0000000005",
    "position": b"-007777.25",
    "number": b"1234567891",
}
"""What differs from file to file, in a width that never changes: a file is its template with a few bytes new."""

PROTOCOL = """StudyTime 081502.123 SeriesTime 081544.55 AcquisitionTime 081546.1 ContentTime 081546.2 StudyDate 20240115
    SeriesDate 20240115 AcquisitionDate 20240115 ContentDate 20240115 AccessionNumber A77 StudyDescription CT_THORAX
    SeriesDescription Thorax_1.0_B60f ManufacturerModelName Scanner_64 StationName CT2 ProtocolName ThoraxRoutine
    BodyPartExamined CHEST KVP 120 DataCollectionDiameter 500 DeviceSerialNumber 12345 SoftwareVersions VA44A
    ReconstructionDiameter 360 DistanceSourceToDetector 1040 DistanceSourceToPatient 570 GantryDetectorTilt 0
    TableHeight 153 RotationDirection CW ExposureTime 500 XRayTubeCurrent 210 Exposure 105 FilterType 0
    GeneratorPower 30 FocalSpots 1.2 DateOfLastCalibration 20240101 TimeOfLastCalibration 060000 PatientPosition FFS
    ConvolutionKernel B60f StudyID 1 SeriesNumber 4 AcquisitionNumber 1 PositionReferenceIndicator SN
    WindowCenter 40 WindowWidth 400 RescaleType HU ReferringPhysicianName Nobody PatientSex F PatientAge 061Y
    PatientBirthDate 19620403 PatientWeight 70 PatientSize 1.7 InstitutionName North InstitutionAddress Road_1
    PerformedProcedureStepStartDate 20240115 PerformedProcedureStepStartTime 081500 PerformedProcedureStepID 9
    RequestedProcedureDescription CT_THORAX SpiralPitchFactor 1.2 TableSpeed 46 TableFeedPerRotation 23
    TotalCollimationWidth 19 SingleCollimationWidth 0.6 ImageComments none Modality CT Manufacturer Acme
    SliceThickness 1 RescaleIntercept -1024 RescaleSlope 1 SamplesPerPixel 1 PhotometricInterpretation MONOCHROME2
    Rows 32 Columns 32 BitsAllocated 16 BitsStored 12 HighBit 11 PixelRepresentation 0 SmallestImagePixelValue 0
    LargestImagePixelValue 2000""".split()
"""Attributes that every file of the export has, each with its value; _ is a space."""


# ---- one series -----------------------------------------------------------------------------------------------------


def largest_series(data: Path | None, scratch: Path) -> medvit.io.Series:
    """The longest usable series below `data`, or else a synthetic one, written below `scratch`."""
    if data is None:
        patient = phantom.make_patients(1, 1)[0]
        hu, affine = phantom.render(patient, matrix=256, slices=120)
        affine[:3, :2] /= 2
        data = scratch / "phantom"
        paths = phantom.write_series(data, np.kron(hu, np.ones((1, 2, 2), np.float32)), affine, patient)
        for number, path in enumerate(paths):  # the phantom's are shuffled: half of the readers sort by them
            dataset = dcmread(path)
            dataset.InstanceNumber = number + 1
            dataset.save_as(path)
    usable = [series for series in medvit.io.scan_folder(data).series if series.usable]
    return max(usable, key=lambda series: len(series.files))


def in_both_encodings(series: medvit.io.Series, scratch: Path) -> dict[str, Source]:
    """The series alone in a folder, as JPEG-LS and uncompressed; what is JPEG-LS already is copied as it is."""
    for number, name in enumerate(series.files):
        path = series.root / name
        dataset = dcmread(path)
        packed, plain = (scratch / encoding / f"{number:05d}.dcm" for encoding in ("JPEG-LS", "uncompressed"))
        for target in (packed, plain):
            target.parent.mkdir(exist_ok=True)
        if dataset.file_meta.TransferSyntaxUID == JPEGLSLossless:
            shutil.copyfile(path, packed)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            dataset.decompress(generate_instance_uid=False)
        dataset.save_as(plain)
        if not packed.exists():
            dataset.compress(JPEGLSLossless, generate_instance_uid=False)
            dataset.save_as(packed)
    return {encoding: _source(scratch / encoding) for encoding in ("uncompressed", "JPEG-LS")}


def _source(folder: Path) -> Source:
    (series,) = medvit.io.scan_folder(folder).series
    return Source(folder, series, tuple(folder / name for name in series.files))


# ---- a folder of many files -----------------------------------------------------------------------------------------


def write_export(folder: Path, files: int, slices: int = SLICES_OF_A_SERIES, per_study: int = 2) -> None:
    """Write `files` slices in series, a study to a patient, each series in a folder of its own."""
    template = _template()
    for first in range(0, files, slices):
        number = first // slices
        patient = number // per_study
        target = folder / f"PA{patient:06d}" / "ST000000" / f"SE{number % per_study:06d}"
        target.mkdir(parents=True)
        raw = _patched(
            template,
            study=b"%010d" % (10**9 + 10**6 + patient),
            series=b"%010d" % (2 * 10**9 + number),
            frame=b"%010d" % (3 * 10**9 + number),
            patient=b"ID%010d" % patient,
        )
        for k in range(min(slices, files - first)):
            changed = _patched(
                raw, instance=b"%010d" % (4 * 10**9 + first + k), position=b"%+010.2f" % k, number=b"%010d" % (k + 1)
            )
            descriptor = os.open(target / f"IM{k:06d}", os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(descriptor, changed)
            os.close(descriptor)


def _patched(raw: bytes, **values: bytes) -> bytes:
    for name, value in values.items():
        place = PLACE[name]
        raw = raw.replace(place, place[: -len(value)] + value)
    return raw


def _template() -> bytes:
    """One file with every place still to be filled."""
    place = {name: value.decode() for name, value in PLACE.items()}
    dataset = Dataset()
    for keyword, value in zip(PROTOCOL[::2], PROTOCOL[1::2], strict=True):
        number = dictionary_VR(keyword) in ("FD", "US", "US or SS")
        setattr(dataset, keyword, float(value) if "." in value and number else int(value) if number else value)
    dataset.SpecificCharacterSet, dataset.ImageType = "ISO_IR 100", ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, place["instance"]
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = place["study"], place["series"]
    dataset.FrameOfReferenceUID, dataset.PatientID = place["frame"], place["patient"]
    dataset.PatientName = f"{place['patient']}^Export"
    dataset.ImageOrientationPatient, dataset.PixelSpacing = ["1", "0", "0", "0", "1", "0"], ["0.7", "0.7"]
    dataset.ImagePositionPatient = ["-180.0", "-180.0", place["position"]]
    dataset.SliceLocation, dataset.InstanceNumber = place["position"], place["number"]
    _add_sequences(dataset, place["study"])
    _add_private(dataset)
    values = np.random.default_rng(0).integers(0, 2000, (32, 32), dtype=np.uint16)
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _add_sequences(dataset: Dataset, uid: str) -> None:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "CTTHOR", "99LOCAL", "CT thorax"
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CTImageStorage, f"{uid[:-10]}9"
    request = Dataset()
    request.RequestedProcedureID, request.ScheduledProcedureStepID = "R1", "S1"
    dataset.ProcedureCodeSequence, dataset.RequestAttributesSequence = [code], [request]
    dataset.ReferencedImageSequence = [reference, reference, reference]


def _add_private(dataset: Dataset) -> None:
    """Numbers of the acquisition, and a protocol of 2 KB, as one large manufacturer writes them."""
    measured = dataset.private_block(0x0019, "ACME CT VA0 COAD", create=True)
    for offset in range(0x90, 0xA8):
        measured.add_new(offset, "DS", f"{offset * 1.5:.1f}")
    shown = dataset.private_block(0x0021, "ACME MED", create=True)
    for offset in range(0x10, 0x18):
        shown.add_new(offset, "LO", f"PRIVATE VALUE {offset}")
    protocol = dataset.private_block(0x0029, "ACME CSA HEADER", create=True)
    protocol.add_new(0x10, "OB", bytes(range(256)) * 9)
