"""DIMSE (PS3.7, PS3.4 annexes B and C) through pynetdicom: C-FIND, C-GET and C-STORE.

C-GET brings images over the connection that asks for them: no port of ours, no entry of ours in the PACS. Each transfer
syntax has a presentation context of its own: with several in one the PACS takes one, and decompresses the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom import uid
from pydicom.dataset import Dataset
from pynetdicom import build_context, build_role, evt
from pynetdicom.dsutils import encode_file_meta

from medvit.io.pacs import Found, Sent
from medvit.io.pacs_dimse_send import Sender
from medvit.io.pacs_inbox import Inbox
from medvit.io.pacs_link import Link
from medvit.io.pacs_retry import TransientError
from medvit.io.pacs_url import PacsUrl
from medvit.io.results import unjudged

FIND, GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"
"""Study Root Query/Retrieve Information Model (PS3.4 C.6.2)."""

NATIVE: list[str | uid.UID] = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian]

CT_CLASSES = [uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage]

CT_SYNTAXES = [
    *NATIVE,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    *uid.JPEGTransferSyntaxes,
    *uid.JPEGLSTransferSyntaxes,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.HTJ2K,
]

OTHER_CLASSES = [
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    uid.RawDataStorage,
]
"""What lies in CT series beside images. Taken too, or the series would never be complete."""

OTHER_SYNTAXES = [*NATIVE, uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEG2000Lossless]

OUT_OF_RESOURCES = 0xA700


class DimseWire:
    """A `Wire` over DIMSE.

    Args:
        url: where it is.
        connect_s: longest wait for a connection.
        read_s: longest silence on one.
    """

    def __init__(self, url: PacsUrl, connect_s: float, read_s: float) -> None:
        self._link = Link(url, connect_s, read_s)

    def studies(self, query: Mapping[str, str], check: Callable[[], None]) -> list[Found]:
        """C-FIND at the level of studies."""
        wanted = _identifier("STUDY", {"StudyInstanceUID": "", "NumberOfStudyRelatedInstances": "", **query})
        return self._find(wanted, "StudyInstanceUID", "NumberOfStudyRelatedInstances", check)

    def series(self, study_uid: str, check: Callable[[], None]) -> list[Found]:
        """C-FIND of the CT series of a study."""
        keys = {"StudyInstanceUID": study_uid, "Modality": "CT"}
        keys |= {"SeriesInstanceUID": "", "NumberOfSeriesRelatedInstances": ""}
        return self._find(_identifier("SERIES", keys), "SeriesInstanceUID", "NumberOfSeriesRelatedInstances", check)

    def _find(self, wanted: Dataset, name: str, instances: str, check: Callable[[], None]) -> list[Found]:
        found = list[Found]()
        with unjudged(), self._link.opened([build_context(FIND, NATIVE)]) as made:
            for answer, match in made.send_c_find(wanted, FIND):
                check()
                if self._link.status(answer, "the search") in {0xFF00, 0xFF01}:  # pending: a match
                    found.append(_found(match, name, instances))
        return found

    def pull(self, study_uid: str, series_uid: str, inbox: Inbox) -> None:
        """C-GET of a series."""
        wanted = _identifier("SERIES", {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid})
        contexts = [build_context(GET, NATIVE)]
        contexts += [build_context(each, syntax) for each in CT_CLASSES for syntax in CT_SYNTAXES]
        contexts += [build_context(each, syntax) for each in OTHER_CLASSES for syntax in OTHER_SYNTAXES]
        roles = [build_role(each, scp_role=True) for each in (*CT_CLASSES, *OTHER_CLASSES)]
        receiver = _Receiver(inbox)
        failed = 0
        with unjudged(), self._link.opened(contexts, roles, [(evt.EVT_C_STORE, receiver.take)]) as made:
            if GET not in {each.abstract_syntax for each in made.accepted_contexts}:
                raise self._link.no_service("C-GET")
            for answer, _ in made.send_c_get(wanted, GET):
                inbox.check()
                if receiver.fault is not None:
                    raise receiver.fault
                self._link.status(answer, "the retrieval")
                failed = answer.get("NumberOfFailedSuboperations") or 0
        if failed:
            raise TransientError(f"could not give {failed} images of a series")

    @contextmanager
    def sender(self, paths: Iterable[Path]) -> Iterator[Callable[[Path], Sent]]:
        """C-STORE over one association, made again where it breaks."""
        sender = Sender(self._link, paths)
        try:
            yield sender.store
        finally:
            sender.close()


class _Receiver:
    """Takes the images of a C-GET; what goes wrong with one is kept, for pynetdicom would swallow it."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.fault: Exception | None = None

    def take(self, event: Any) -> int:
        """Save one image as it came, under a preamble and file meta information (PS3.10 7.1)."""
        if self.fault is not None:
            return OUT_OF_RESOURCES
        try:
            head = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
            self._inbox.save([head, event.request.DataSet.getbuffer()])
        except Exception as error:  # noqa: BLE001  raised again by who asked for the images
            self.fault = error
            event.assoc.dimse.msg_queue.put((None, None))  # as pynetdicom wakes up who waits for an answer; it aborts
            return OUT_OF_RESOURCES
        return 0


def _identifier(level: str, keys: Mapping[str, str]) -> Dataset:
    wanted = Dataset()
    if not "".join(keys.values()).isascii():
        wanted.SpecificCharacterSet = "ISO_IR 192"
    wanted.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(wanted, keyword, value or None)
    return wanted


def _found(match: Dataset | None, name: str, instances: str) -> Found:
    """One match; a UID that is not there is empty, which is not legal either."""
    known = Dataset() if match is None else match
    number = str(known.get(instances, ""))
    return Found(str(known.get(name, "")), int(number) if number.isdecimal() else None)
