"""A slice with what the model looked at drawn over it, as Secondary Capture (PS3.3 A.8.1), which every viewer shows."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import SecondaryCaptureImageStorage

from medvit.io.results import RESEARCH_USE, Composed, ResultContext, finish, start_document, unjudged
from medvit.io.results_source import Source, copy_lossy, reference

SERIES_NUMBER = 9101
"""After that of reports."""


def write_sc(rgb: npt.NDArray[np.uint8], number: int, source: Source, context: ResultContext, folder: Path) -> Path:
    """Write what `compose_sc` makes into a folder, made when missing; the file is named by its UID."""
    return compose_sc(rgb, number, source, context).write(folder)


@unjudged()
def compose_sc(rgb: npt.NDArray[np.uint8], number: int, source: Source, context: ResultContext) -> Composed:
    """The picture of a slice, with 'RESEARCH USE' drawn into it.

    Args:
        rgb: (H, W, 3).
        number: of the slice, as in `Prediction.slice_weights`.
        source: the series.
        context: model and time.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")
    document = start_document(SecondaryCaptureImageStorage, "picture", source, context, str(number))
    document.Modality, document.SeriesNumber, document.InstanceNumber = "OT", SERIES_NUMBER, number + 1
    document.ConversionType = "WSD"  # workstation: PS3.3 C.8.6.1
    document.ImageType = ["DERIVED", "SECONDARY"]
    document.PatientOrientation = document.Laterality = ""  # type 2C, unknown (PS3.3 C.7.6.1, C.7.3.1)
    document.DerivationDescription = (
        f"Slice {number + 1} with the relevance map of {context.model_name} {context.model_version}. "
        f"{RESEARCH_USE.capitalize()}."
    )
    # what is drawn in does not tell who the patient is, which is what the attribute asks (PS3.3 C.7.6.1)
    document.BurnedInAnnotation = "NO"
    if (image := source.image(number)) is not None:
        item = reference(image)
        item.PurposeOfReferenceCodeSequence = [_purpose()]
        document.SourceImageSequence = [item]
    copy_lossy(document, source)
    _put_pixels(document, draw_research_use(rgb))
    return finish(document, source, context)


def draw_research_use(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture with the words in its lower left corner, white on black so that they stand out on any ground."""
    drawn = np.ascontiguousarray(rgb).copy()
    rows, columns = drawn.shape[:2]
    font, margin = cv2.FONT_HERSHEY_SIMPLEX, 1 + columns // 60
    scale = 0.4 * columns / cv2.getTextSize(RESEARCH_USE, font, 1.0, 1)[0][0]
    (width, height), below = cv2.getTextSize(RESEARCH_USE, font, scale, 1)
    base = rows - 1 - margin - below
    cv2.rectangle(drawn, (0, base - height - margin), (width + 2 * margin, rows), (0, 0, 0), cv2.FILLED)
    cv2.putText(drawn, RESEARCH_USE, (margin, base), font, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return drawn


def _purpose() -> Dataset:
    item, code = Dataset(), codes.DCM.SourceImageForImageProcessingOperation
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _put_pixels(document: Dataset, rgb: npt.NDArray[np.uint8]) -> None:
    """Image Pixel module (PS3.3 C.7.6.3), colour by pixel."""
    document.Rows, document.Columns = rgb.shape[:2]
    document.SamplesPerPixel, document.PhotometricInterpretation, document.PlanarConfiguration = 3, "RGB", 0
    document.BitsAllocated, document.BitsStored, document.HighBit, document.PixelRepresentation = 8, 8, 7, 0
    raw = rgb.tobytes()
    document.PixelData = raw + b"\0" * (len(raw) % 2)
    document["PixelData"].VR = "OB"
