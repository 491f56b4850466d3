"""A prediction as a structured report: Comprehensive 3D SR by TID 1500 (PS3.16), which viewers show as measurements.

One measurement group (TID 1501) for the study says what was found, the probability of each class, the operating point,
the flags and which model it was; one for each deciding slice refers to its image. Only the class that was called is a
Finding: groups for all classes would show each of them as found. Basic Text SR would hold the same, and many viewers do
not show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import Comprehensive3DSRStorage

from medvit.io.headers import SliceHeader
from medvit.io.results import (
    PRIVATE_SCHEME,
    RESEARCH_USE,
    Composed,
    Finding,
    ResultContext,
    deciding_slices,
    finish,
    private_code,
    result_uid,
    start_document,
    uid_of,
    unjudged,
)
from medvit.io.results_source import Source, frame_number, reference
from medvit.records import Prediction

SERIES_NUMBER = 9100
"""Far from those of scanners."""


def write_sr(prediction: Prediction, source: Source, context: ResultContext, folder: Path) -> Path:
    """Write what `compose_sr` makes into a folder, made when missing; the file is named by its UID."""
    return compose_sr(prediction, source, context).write(folder)


@unjudged()
def compose_sr(prediction: Prediction, source: Source, context: ResultContext, *, predecessor: str = "") -> Composed:
    """A prediction as a structured report.

    Args:
        prediction: of the series.
        source: the series.
        context: model, codes and time.
        predecessor: SOPInstanceUID of the report of this study by this model whose place it takes.

    Raises:
        ValueError: the prediction is of another series.
    """
    if prediction.series_uid not in ("", source.uids[1]):
        raise ValueError("the prediction is of another series than the source")
    document = start_document(Comprehensive3DSRStorage, "report", source, context)
    document.Modality, document.SeriesNumber, document.InstanceNumber = "SR", SERIES_NUMBER, 1
    # SR Document General module (PS3.3 C.17.2): all is said, and nobody has looked at it
    document.CompletionFlag, document.VerificationFlag = "COMPLETE", "UNVERIFIED"
    document.PreliminaryFlag = "PRELIMINARY"
    document.ReferencedPerformedProcedureStepSequence = []
    document.PerformedProcedureCodeSequence = []
    document.CurrentRequestedProcedureEvidenceSequence = [_evidence(source)]
    if predecessor:
        document.PredecessorDocumentsSequence = [_predecessor(predecessor, source, document.SeriesInstanceUID)]
    document.CodingSchemeIdentificationSequence = [_coding_scheme()]
    (content,) = _report(prediction, source, context)
    document.update(content)
    if context.pseudonym is None:  # otherwise the character set is not the source's
        _spell(content.ContentSequence, source)
    return finish(document, source, context)


def _report(prediction: Prediction, source: Source, context: ResultContext) -> MeasurementReport:
    device = DeviceObserverIdentifyingAttributes(
        uid=result_uid("device", context.model_sha256), name="medvit", model_name=context.model_name
    )
    return MeasurementReport(
        observation_context=ObservationContext(ObserverContext(codes.DCM.Device, device)),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=[
            _study_group(prediction, source, context),
            *_slice_groups(prediction, source, context),
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )


def _study_group(
    prediction: Prediction, source: Source, context: ResultContext
) -> MeasurementsAndQualitativeEvaluations:
    names = list(prediction.probabilities)
    measurements = [
        _measurement(private_code(f"PROBABILITY_{name}", f"Probability of {context.finding(name).meaning}"), value)
        for name, value in prediction.probabilities.items()
    ]
    if prediction.threshold is not None:
        meaning = f"Operating point on {context.finding(names[-1]).meaning}"
        measurements.append(_measurement(private_code("OPERATING_POINT", meaning), prediction.threshold))
    flags = [private_code(flag, flag.replace("_", " ").capitalize()) for flag in prediction.flags]
    evaluations = [
        (private_code("INTENDED_USE", "Intended use"), private_code("RESEARCH", RESEARCH_USE.capitalize())),
        *((private_code("FLAG", "Flag"), flag) for flag in flags),
    ]
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid_of("study group", source, context), "study"),
        finding_type=_concept(context.finding(prediction.predicted)),
        algorithm_id=_algorithm(context),
        measurements=measurements,
        qualitative_evaluations=[QualitativeEvaluation(_concept(what), _concept(which)) for what, which in evaluations],
    )


def _slice_groups(
    prediction: Prediction, source: Source, context: ResultContext
) -> Iterator[MeasurementsAndQualitativeEvaluations]:
    for number, weight in deciding_slices(prediction):
        if (image := source.image(number)) is not None:
            yield MeasurementsAndQualitativeEvaluations(
                tracking_identifier=TrackingIdentifier(
                    uid_of("slice group", source, context, str(number)), f"slice {number + 1}"
                ),
                finding_type=_concept(context.finding(prediction.predicted)),
                measurements=[_measurement(private_code("SLICE_WEIGHT", "Attention weight of the slice"), weight)],
                source_images=[_source_image(image)],
            )


def _source_image(one: SliceHeader) -> SourceImageForMeasurementGroup:
    frame = frame_number(one)
    return SourceImageForMeasurementGroup(one.shared.sop_class, one.sop_uid, None if frame is None else [frame])


def _algorithm(context: ResultContext) -> AlgorithmIdentification:
    """TID 4019."""
    parameters = [f"model sha256 {context.model_sha256}", f"config sha256 {context.config_sha256}"]
    return AlgorithmIdentification(context.model_name, context.model_version, parameters)


def _measurement(name: Finding, value: float) -> Measurement:
    return Measurement(name=_concept(name), value=round(value, 6), unit=codes.UCUM.NoUnits)


def _concept(code: Finding) -> CodedConcept:
    return CodedConcept(code.value, code.scheme, code.meaning)


def _evidence(source: Source) -> Dataset:
    """All images of the series, each once (PS3.3 C.17.2, table C.17-3)."""
    images = {one.sop_uid: reference(one, whole=True) for one in source.slices}
    return _in_study(*source.uids, list(images.values()))


def _predecessor(sop_uid: str, source: Source, series_uid: str) -> Dataset:
    """The report that this one replaces (PS3.3 C.17.2); reports of a study form one series."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = Comprehensive3DSRStorage, sop_uid
    return _in_study(source.uids[0], series_uid, [item])


def _in_study(study_uid: str, series_uid: str, objects: list[Dataset]) -> Dataset:
    """Hierarchical SOP Instance Reference macro (PS3.3 table C.17-3)."""
    study, series = Dataset(), Dataset()
    study.StudyInstanceUID, series.SeriesInstanceUID = study_uid, series_uid
    series.ReferencedSOPSequence = objects
    study.ReferencedSeriesSequence = [series]
    return study


def _coding_scheme() -> Dataset:
    """PS3.3 C.12.1.1.16."""
    scheme = Dataset()
    scheme.CodingSchemeDesignator, scheme.CodingSchemeName = PRIVATE_SCHEME, "Codes of medvit"
    scheme.CodingSchemeResponsibleOrganization = "medvit"
    return scheme


def _spell(items: Iterable[Dataset], source: Source) -> None:
    """Class names in letters that the source's character set lacks are spelled out.

    An item could declare a character set of its own (PS3.3 C.12.1.1.2), but dcmtk does not look there and refuses the
    report.
    """
    for item in items:
        for element in item:
            if element.VR == "SQ":
                _spell(element.value, source)
            elif not source.writes(text := str(element.value)):
                element.value = "".join(one if one.isascii() else f"[U+{ord(one):04X}]" for one in text)[:64]
