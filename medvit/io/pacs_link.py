"""One DIMSE association (PS3.8): made, ended, and why it was not made."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from medvit.io.pacs_retry import PacsRefusedError, TransientError, silence
from medvit.io.pacs_url import PacsUrl

CONTEXTS_LIMIT = 128
"""Presentation contexts of one association: their ids are odd bytes (PS3.8 9.3.2.2)."""

CALLING_UNKNOWN, CALLED_UNKNOWN = 3, 7
"""Reasons of a rejection by the service user (PS3.8 9.3.4)."""

REJECTED_FOR_NOW = 2

Kind = tuple[str, str]
"""SOP class and transfer syntax: what a presentation context is about."""


class NothingAcceptedError(PacsRefusedError):
    """The PACS takes none of the proposed presentation contexts."""


@dataclass(frozen=True)
class Link:
    """Where a PACS is, and how long to wait for it.

    Attributes:
        url: of a DIMSE service.
        connect_s: longest wait for a connection.
        read_s: longest silence on one.
    """

    url: PacsUrl
    connect_s: float
    read_s: float
    _sockets: dict[Association, socket.socket] = field(default_factory=dict, repr=False)

    def open(
        self, contexts: Sequence[PresentationContext], roles: Sequence[Any] = (), handlers: Sequence[Any] = ()
    ) -> Association:
        """An established association.

        Raises:
            TransientError: nobody answers, or not now.
            PacsRefusedError: it rejects us.
        """
        quieten()
        entity = AE(ae_title=self.url.our_aet)
        entity.connection_timeout = self.connect_s
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self.read_s
        made = entity.associate(
            self.url.host,
            self.url.port,
            list(contexts),
            ae_title=self.url.aet,
            ext_neg=list(roles),
            evt_handlers=[*handlers, (evt.EVT_CONN_OPEN, self._keep)],
        )
        if not made.is_established:
            self._drop(made)
            raise self._refusal(made)
        return made

    @contextmanager
    def opened(
        self, contexts: Sequence[PresentationContext], roles: Sequence[Any] = (), handlers: Sequence[Any] = ()
    ) -> Iterator[Association]:
        """`open` as a context; aborted where it is left by an error."""
        made = self.open(contexts, roles, handlers)
        try:
            yield made
        except BaseException:
            made.abort()
            raise
        finally:
            self.close(made)

    def close(self, made: Association) -> None:
        """Release an association; where it is gone already, what is left of it goes."""
        if made.is_established:
            made.release()
        self._drop(made)

    def _keep(self, event: Any) -> None:
        self._sockets[event.assoc] = event.assoc.dul.socket.socket

    def _drop(self, made: Association) -> None:
        """Close the socket, which pynetdicom forgets to do where the other side was first or nobody answered."""
        if made.is_alive():
            made.join(1)
        left = self._sockets.pop(made, None) or getattr(made.dul.socket, "socket", None)
        if left is not None:
            left.close()

    def _refusal(self, made: Association) -> Exception:
        if made.is_rejected:
            return self._rejection(made.acceptor.primitive)
        if made.rejected_contexts:
            return NothingAcceptedError(str(self.no_service("search, retrieval or storage")))
        return TransientError("no answer to the request for an association")

    def no_service(self, name: str) -> PacsRefusedError:
        """The PACS does not offer a service that it was asked for."""
        return PacsRefusedError(
            f"{self.url.place}: offers no {name} to {self.url.our_aet}. Use its DICOMweb service, or ask who runs "
            "the PACS to allow it."
        )

    def _rejection(self, answer: Any) -> Exception:
        result, reason = getattr(answer, "result", None), getattr(answer, "diagnostic", None)
        if result == REJECTED_FOR_NOW:
            return TransientError("rejects associations for now")
        hint = "Ask who runs the PACS."
        if reason == CALLING_UNKNOWN:
            hint = f"It does not know us as {self.url.our_aet}: have that title entered, or give another with ?aet=."
        if reason == CALLED_UNKNOWN:
            hint = f"It is not called {self.url.aet}: put its AE title before the @."
        return PacsRefusedError(f"{self.url.place}: rejects our association (reason {reason}). {hint}")

    def status(self, answer: Dataset, what: str) -> int:
        """The status of an answer that is no refusal.

        Raises:
            TransientError: there is none, or the PACS is out of resources (PS3.4 annexes B.2.3, C.4).
            PacsRefusedError: a failure of another kind.
        """
        status = answer.get("Status")
        if status is None:
            raise TransientError(f"{what} was broken off")
        if 0xA700 <= status <= 0xA7FF:
            raise TransientError(f"out of resources for {what} (status {status:04X})")
        if not (status in {0x0000, 0xFF00, 0xFF01} or 0xB000 <= status <= 0xBFFF):
            raise PacsRefusedError(f"{self.url.place}: refuses {what} (status {status:04X}). Ask who runs the PACS.")
        return int(status)


def accepted(made: Association) -> set[Kind]:
    """What the PACS takes."""
    return {(str(each.abstract_syntax), str(each.transfer_syntax[0])) for each in made.accepted_contexts}


def quieten() -> None:
    """Silence in pynetdicom, whoever asks it to speak; and files are sent as they are."""
    silence("pynetdicom")
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_RESPONSE_IDENTIFIERS = _config.LOG_REQUEST_IDENTIFIERS = False
    _config.STORE_SEND_CHUNKED_DATASET = True
