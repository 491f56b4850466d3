"""Which data elements medvit looks at, and whether their values are binary; and which SOP classes are CT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FUNCTIONAL_GROUPS: dict[int, Any] = {
    0x0020_9113: ("PlanePositionSequence", {0x0020_0032: "ImagePositionPatient"}),
    0x0020_9116: ("PlaneOrientationSequence", {0x0020_0037: "ImageOrientationPatient"}),
    0x0028_9110: ("PixelMeasuresSequence", {0x0028_0030: "PixelSpacing", 0x0018_0050: "SliceThickness"}),
    0x0028_9145: (
        "PixelValueTransformationSequence",
        {0x0028_1052: "RescaleIntercept", 0x0028_1053: "RescaleSlope", 0x0028_1054: "RescaleType"},
    ),
    0x0020_9111: (
        "FrameContentSequence",
        {0x0020_9128: "TemporalPositionIndex", 0x0020_9156: "FrameAcquisitionNumber"},
    ),
    0x0018_9314: ("CTReconstructionSequence", {0x0018_1210: "ConvolutionKernel"}),
    0x0018_9329: ("CTImageFrameTypeSequence", {0x0008_9007: "FrameType"}),
}
"""What places one frame of an Enhanced CT object (PS3.3 C.7.6.16): shared by all frames, or given for each."""

WANTED: Mapping[int, Any] = {
    0x0008_0005: "SpecificCharacterSet",
    0x0008_0008: "ImageType",
    0x0008_0016: "SOPClassUID",
    0x0008_0018: "SOPInstanceUID",
    0x0008_0020: "StudyDate",
    0x0008_0032: "AcquisitionTime",
    0x0008_0033: "ContentTime",
    0x0008_0060: "Modality",
    0x0008_0070: "Manufacturer",
    0x0008_0080: "InstitutionName",
    0x0008_103E: "SeriesDescription",
    0x0010_0010: "PatientName",
    0x0010_0020: "PatientID",
    0x0010_0021: "IssuerOfPatientID",
    0x0010_0030: "PatientBirthDate",
    0x0010_0040: "PatientSex",
    0x0010_1010: "PatientAge",
    0x0018_0010: "ContrastBolusAgent",
    0x0018_0015: "BodyPartExamined",
    0x0018_0050: "SliceThickness",
    0x0018_0060: "KVP",
    0x0018_1060: "TriggerTime",
    0x0018_1210: "ConvolutionKernel",
    0x0020_000D: "StudyInstanceUID",
    0x0020_000E: "SeriesInstanceUID",
    0x0020_0012: "AcquisitionNumber",
    0x0020_0032: "ImagePositionPatient",
    0x0020_0037: "ImageOrientationPatient",
    0x0020_0052: "FrameOfReferenceUID",
    0x0020_0100: "TemporalPositionIdentifier",
    0x0020_9241: "NominalPercentageOfCardiacPhase",
    0x0028_0002: "SamplesPerPixel",
    0x0028_0004: "PhotometricInterpretation",
    0x0028_0008: "NumberOfFrames",
    0x0028_0010: "Rows",
    0x0028_0011: "Columns",
    0x0028_0030: "PixelSpacing",
    0x0028_0100: "BitsAllocated",
    0x0028_0101: "BitsStored",
    0x0028_0102: "HighBit",
    0x0028_0103: "PixelRepresentation",
    0x0028_0120: "PixelPaddingValue",
    0x0028_0121: "PixelPaddingRangeLimit",
    0x0028_1052: "RescaleIntercept",
    0x0028_1053: "RescaleSlope",
    0x0028_1054: "RescaleType",
    0x0028_2110: "LossyImageCompression",
    0x0028_3000: ("ModalityLUTSequence", {}),
    0x5200_9229: ("SharedFunctionalGroupsSequence", _FUNCTIONAL_GROUPS),
    0x5200_9230: ("PerFrameFunctionalGroupsSequence", _FUNCTIONAL_GROUPS),
}

INTEGERS = frozenset(
    "SamplesPerPixel Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue "
    "PixelPaddingRangeLimit TemporalPositionIndex FrameAcquisitionNumber".split()
)
"""Elements whose value is binary (US, SS, UL); all other wanted ones are text."""

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTIFRAME_CT = {"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}
"""Enhanced CT and Legacy Converted Enhanced CT Image Storage."""
