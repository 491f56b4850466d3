"""Results without identity: the Basic Application Level Confidentiality Profile of PS3.15 E.2, and two of its options.

What is removed, emptied and replaced is read from table E.1-1 as dicom-anonymizer has it. The walk is ours. That of the
library acts on the outermost level alone, so that references inside sequences keep their UIDs; it fills the content of
reports with dummies that are no codes, empties references to source images, dates what is unknown in the year 1, which
validators refuse, and makes UIDs at random, remembering each. An attribute that neither the table nor `KEPT` names is
removed as well: the table does not list all text.

Kept beyond the profile, and said so by code: the content of reports (PS3.15 E.3.4) and two descriptions (E.3.5), both
only in the words in which medvit writes them. Pixels are not looked at.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from dicomanonymizer import simpledicomanonymizer as library
from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.tag import BaseTag

Pseudonym = Callable[[str, str], str]
"""(kind, value) -> hash under a key of the site."""

TABLE: Mapping[tuple[int, ...], Callable[..., None]] = library.initialize_actions("dicomfields_2026c")
"""Tag -> action of table E.1-1; the edition is named, for the library's default is of 2023."""

KEPT = frozenset(
    """SpecificCharacterSet SOPClassUID Modality SeriesNumber InstanceNumber
    Manufacturer ManufacturerModelName SoftwareVersions
    ImageType ConversionType PatientOrientation Laterality BurnedInAnnotation SourceImageSequence
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration Rows Columns BitsAllocated BitsStored HighBit
    PixelRepresentation PixelData
    CompletionFlag VerificationFlag PreliminaryFlag ReferencedPerformedProcedureStepSequence
    PerformedProcedureCodeSequence CurrentRequestedProcedureEvidenceSequence ReferencedSeriesSequence
    ReferencedSOPSequence ReferencedSOPClassUID ReferencedFrameNumber PurposeOfReferenceCodeSequence
    CodingSchemeIdentificationSequence CodingSchemeName CodingSchemeResponsibleOrganization
    CodeValue LongCodeValue CodingSchemeDesignator CodingSchemeVersion CodeMeaning
    ValueType RelationshipType ContinuityOfContent ContentTemplateSequence MappingResource TemplateIdentifier
    ContentSequence ConceptNameCodeSequence ConceptCodeSequence TextValue
    MeasuredValueSequence MeasurementUnitsCodeSequence NumericValue FloatingPointValue""".split()
)
"""What medvit writes of itself; UIDs of instances among it are replaced all the same."""

SHAPES: Mapping[str, re.Pattern[str]] = {
    keyword: re.compile(shape)
    for keyword, shape in {
        "SeriesDescription": "medvit [a-z]+, research use",
        "DerivationDescription": r"Slice \d+ with the relevance map of .*\. Research use\.",
        "DeviceSerialNumber": "[0-9a-f]{64}",  # hash of the weights: D, "may be a dummy value"
        "TypeOfPatientID": "TEXT|RFID|BARCODE",
        "LossyImageCompression": "0[01]",
        "LossyImageCompressionRatio": r"\d{1,3}(\.\d{1,3})?",
        "LossyImageCompressionMethod": r"ISO_\d{5}_\d{1,2}",
    }.items()
}
"""Kept where the value is of this shape: ours, or copied from the source, which may hold anything."""

VALUE_TYPES = frozenset({"CONTAINER", "CODE", "NUM", "IMAGE", "UIDREF"})
"""Content items that stay; persons, dates and times go (PS3.3 C.17.3)."""

TEXTS = {
    ("DCM", code)
    for code in (
        codes.DCM.TrackingIdentifier.value,
        codes.DCM.DeviceObserverName.value,
        codes.DCM.DeviceObserverModelName.value,
        codes.DCM.AlgorithmName.value,
        codes.DCM.AlgorithmVersion.value,
        codes.DCM.AlgorithmParameters.value,
    )
}
"""Text items that stay, by concept name: what the model is, and 'slice 3'."""

METHOD = (
    codes.DCM.BasicApplicationConfidentialityProfile,  # 113100
    codes.DCM.CleanStructuredContentOption,  # 113104
    codes.DCM.CleanDescriptorsOption,  # 113105
)

DUMMIES = {"DA": "19000101", "TM": "000000", "DT": "19000101000000"}
"""In place of a date that an object must have."""

_UIDS = {library.replace_UID, library.delete_or_empty_or_replace_UID}
_EMPTIED = {library.empty, library.delete_or_empty}
_REPLACED = {library.replace, library.empty_or_replace}  # the others are optional in what medvit writes: removed


def deidentify(document: Dataset, pseudonym: Pseudonym, patient_id: str) -> None:
    """Take identity out of a report or picture of `medvit.io.results`, in place and before it is saved.

    The same UID becomes the same new one in all results of one key, so that those of a study stay together.

    Args:
        document: an SR or SC that medvit made; of other objects more is lost than identity.
        pseudonym: its hashes take the place of UIDs.
        patient_id: stands for the patient's id and name.

    Raises:
        ValueError: the pseudonym is no short ASCII word, and may be identity.
    """
    _clean(document, pseudonym)
    document.SpecificCharacterSet = "ISO_IR 192"  # raw text of the source is gone, and this one has all letters
    document.PatientID = document.PatientName = _word(patient_id)
    document.PatientIdentityRemoved = "YES"
    document.DeidentificationMethod = "medvit: PS3.15 E.1-1"
    document.DeidentificationMethodCodeSequence = [_code(*concept[:3]) for concept in METHOD]
    document.LongitudinalTemporalInformationModified = "REMOVED"


def keyed_uid(uid: str, pseudonym: Pseudonym) -> str:
    """The UID that takes the place of another: a UUID under its root (PS3.5 B.2), of 122 bits of hash."""
    # two hashes: one of 64 bits has collisions among the images of a large hospital
    text = _word(pseudonym("uid", uid)) + _word(pseudonym("uid, other half", uid))
    return f"2.25.{uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4).int}"


def _word(pseudonym: str) -> str:
    if not re.fullmatch("[0-9A-Za-z_-]{8,64}", pseudonym):
        raise ValueError("a pseudonym has 8 to 64 letters and digits")
    return pseudonym


def _clean(dataset: Dataset, pseudonym: Pseudonym) -> None:
    """Act on each element by its tag, and in the items of sequences that stay."""
    for tag in list(dataset.keys()):
        keyword, vr, action = keyword_for_tag(tag), _vr(tag), TABLE.get((tag.group, tag.element))
        kept = keyword in KEPT and (keyword != "TextValue" or dataset.get("ValueType") == "TEXT")
        if vr == "SQ" and kept:
            _clean_items(dataset, tag, pseudonym)
        elif vr == "UI" and action in _UIDS:
            _put(dataset, tag, [keyed_uid(uid, pseudonym) if uid else "" for uid in _text(dataset, tag).split("\\")])
        elif shape := SHAPES.get(keyword):
            if not all(shape.fullmatch(value) for value in _text(dataset, tag).split("\\")):
                del dataset[tag]
        elif action in _EMPTIED and vr != "SQ":
            _put(dataset, tag, "")
        elif action in _REPLACED and vr != "SQ":
            _put(dataset, tag, DUMMIES.get(vr, ""))
            if vr not in DUMMIES:
                library.replace_element(dataset[tag])
        elif not kept or action is not None:
            del dataset[tag]


def _clean_items(dataset: Dataset, tag: BaseTag, pseudonym: Pseudonym) -> None:
    items = dataset[tag].value
    if tag == keyword_dict["ContentSequence"]:
        items[:] = [item for item in items if _content_stays(item)]
    for item in items:
        _clean(item, pseudonym)


def _content_stays(item: Dataset) -> bool:
    names = {
        (name.get("CodingSchemeDesignator"), name.get("CodeValue")) for name in item.get("ConceptNameCodeSequence", ())
    }
    value_type = item.get("ValueType")
    return value_type in VALUE_TYPES or (value_type == "TEXT" and bool(names) and names <= TEXTS)


def _vr(tag: BaseTag) -> str:
    return "" if tag.is_private or not keyword_for_tag(tag) else dictionary_VR(tag)


def _text(dataset: Dataset, tag: BaseTag) -> str:
    """Values as text, joined as in a file; pydicom, which logs what it sees, decodes no bytes of the source."""
    value: Any = dataset.get_item(tag).value
    if isinstance(value, bytes):
        return value.decode("latin-1").strip(" \0")
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")


def _put(dataset: Dataset, tag: BaseTag, value: str | list[str]) -> None:
    """Give an element a new value without looking at the old one."""
    dataset[tag] = DataElement(tag, _vr(tag), value)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
