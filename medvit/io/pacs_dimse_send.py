"""C-STORE (PS3.4 annex B) of files as they are: no data set is decoded, none is held whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from medvit.io.pacs import Sent
from medvit.io.pacs_link import CONTEXTS_LIMIT, Kind, Link, NothingAcceptedError, accepted
from medvit.io.pacs_retry import TransientError
from medvit.io.pacs_stow import DUPLICATE
from medvit.io.results import unjudged


class Sender:
    """Sends files over one association.

    Args:
        link: to the PACS.
        paths: all files to come, so that one association will do for them.
    """

    def __init__(self, link: Link, paths: Iterable[Path]) -> None:
        self._link = link
        self._kinds = list(dict.fromkeys(kind for path in paths if (kind := _kind(path)) is not None))
        self._made: Association | None = None
        self._proposed = set[Kind]()

    def store(self, path: Path) -> Sent:
        """Send one.

        Raises:
            TransientError: the connection broke, or the PACS is out of resources.
            PacsRefusedError: it rejects us.
        """
        kind = _kind(path)
        if kind is None:
            return Sent(path, False, "NOT_DICOM")
        try:
            with unjudged():
                made = self._association(kind)
                if kind not in accepted(made):
                    return Sent(path, False, "NOT_SUPPORTED")
                status = made.send_c_store(path).get("Status")
        except NothingAcceptedError:
            return Sent(path, False, "NOT_SUPPORTED")
        except (AttributeError, RuntimeError, ValueError):  # it was closed meanwhile, or the file changed
            status = None
        return self._judged(path, status)

    def _judged(self, path: Path, status: int | None) -> Sent:
        if status is None:
            self.close()
            raise TransientError("storing was broken off")
        if status == 0x0000 or 0xB000 <= status <= 0xBFFF:  # B000, B006, B007: stored, with a warning
            return Sent(path, True)
        if status == DUPLICATE:
            return Sent(path, True, "ALREADY_THERE")
        if 0xA700 <= status <= 0xA7FF:
            raise TransientError(f"out of resources for storing (status {status:04X})")
        return Sent(path, False, f"STATUS_{status:04X}")

    def _association(self, kind: Kind) -> Association:
        """The one there is, where it lives and this kind was proposed on it."""
        if self._made is None or not self._made.is_established or kind not in self._proposed:
            self.close()
            proposed = list(dict.fromkeys((kind, *self._kinds)))[:CONTEXTS_LIMIT]
            self._made = self._link.open([build_context(*each) for each in proposed])
            self._proposed = set(proposed)
        return self._made

    def close(self) -> None:
        """End the association."""
        made, self._made = self._made, None
        if made is not None:
            self._link.close(made)


def _kind(path: Path) -> Kind | None:
    """From the file meta information; None: it has none, or an odd length, on which dcmtk hangs up without a word."""
    try:
        with unjudged():
            meta = read_file_meta_info(path)
            if path.stat().st_size % 2:  # PS3.8 annex E: fragments are even
                return None
            return str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)
    except Exception:  # noqa: BLE001  pydicom has nine kinds for a damaged file
        return None
