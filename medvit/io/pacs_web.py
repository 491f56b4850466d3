"""DICOMweb (PS3.18): QIDO-RS, WADO-RS and STOW-RS.

Searching is dicomweb-client's. Retrieving and storing use its session alone: it decodes what it receives and encodes
what it sends, and our images are to stay as they are, byte for byte and never whole in memory.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from dicomweb_client.web import DICOMwebClient

from medvit.io.pacs import Found, Sent
from medvit.io.pacs_inbox import Inbox
from medvit.io.pacs_multipart import boundary_of, parts
from medvit.io.pacs_retry import PacsRefusedError, TransientError, silence
from medvit.io.pacs_stow import Body, judge
from medvit.io.pacs_url import PacsUrl

PAGE = 500
"""Matches asked for at a time."""

CHUNK_BYTES = 1 << 17

MAY_PASS = {408, 429, 502, 503, 504}
"""HTTP statuses after which the same request is sent again."""

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
"""Without the star a server would decompress (PS3.18 8.7.3.5.2)."""

STUDY_UID, SERIES_UID, STUDY_INSTANCES, SERIES_INSTANCES = "0020000D", "0020000E", "00201208", "00201209"


class _Credentials(requests.auth.AuthBase):
    """As an object rather than a header: it is what keeps requests from looking for others in a .netrc."""

    def __init__(self, url: PacsUrl) -> None:
        self._url = url

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._url.token:
            request.headers["Authorization"] = f"Bearer {self._url.token}"
        elif self._url.user:
            return requests.auth.HTTPBasicAuth(self._url.user.encode(), self._url.password.encode())(request)
        return request


class _Session(requests.Session):
    """Leaves wildcards and lists as they are: `*`, `?`, `,` need no escape in a query (RFC 3986 3.4).

    dicomweb-client escapes them all, and Orthanc, for one, does not undo it.
    """

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request."""
        if request.url is not None:
            address, mark, query = request.url.partition("?")
            for escaped, plain in (("%2A", "*"), ("%3F", "?"), ("%2C", ",")):
                query = query.replace(escaped, plain)
            request.url = f"{address}{mark}{query}"
        return super().send(request, **options)


class WebWire:
    """A `Wire` over DICOMweb.

    Args:
        url: where it is.
        connect_s: longest wait for a connection.
        read_s: longest silence on one.
    """

    def __init__(self, url: PacsUrl, connect_s: float, read_s: float) -> None:
        silence("dicomweb_client", "urllib3", "requests", "retrying", "charset_normalizer")
        self._url, self._timeout = url, (connect_s, read_s)
        self._session = _Session()
        # a proxy is for the world outside, not for the archive of the house
        self._session.trust_env = False
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._session.max_redirects = 0  # identity goes where it was told to go, nowhere else
        self._session.auth = _Credentials(url)
        self._session.headers["Accept-Encoding"] = "identity"  # images are compressed, or bombs
        self._client = DICOMwebClient(url.http, session=self._session, timeout=self._timeout)
        self._client.set_http_retry_params(retry=False)
        self._client.host = url.place  # what it says in Host, where it forgets the port

    def studies(self, query: Mapping[str, str], check: Callable[[], None]) -> list[Found]:
        """QIDO-RS, page by page, until one brings nothing new: servers bound and ignore `limit` as they like."""

        def page(offset: int) -> list[dict[str, Any]]:
            return self._client.search_for_studies(
                search_filters=dict(query), fields=["NumberOfStudyRelatedInstances"], limit=PAGE, offset=offset
            )

        return self._all(page, STUDY_UID, STUDY_INSTANCES, check)

    def series(self, study_uid: str, check: Callable[[], None]) -> list[Found]:
        """QIDO-RS of the CT series of a study."""

        def page(offset: int) -> list[dict[str, Any]]:
            return self._client.search_for_series(
                study_uid,
                search_filters={"Modality": "CT"},
                fields=["NumberOfSeriesRelatedInstances"],
                limit=PAGE,
                offset=offset,
            )

        return self._all(page, SERIES_UID, SERIES_INSTANCES, check)

    def _all(
        self, page: Callable[[int], list[dict[str, Any]]], uid: str, instances: str, check: Callable[[], None]
    ) -> list[Found]:
        found, offset = dict[str, Found](), 0
        while True:
            check()
            with _translated(self._url):
                matches = page(offset)
            new = {one.study_uid: one for one in (_found(match, uid, instances) for match in matches)}
            if not new.keys() - found.keys():
                return list(found.values())
            found |= new
            offset += len(matches)

    def pull(self, study_uid: str, series_uid: str, inbox: Inbox) -> None:
        """WADO-RS of a series."""
        url = f"{self._url.http}/studies/{study_uid}/series/{series_uid}"
        with (
            _translated(self._url),
            self._session.get(
                url, headers={"Accept": AS_STORED}, stream=True, timeout=self._timeout, allow_redirects=False
            ) as response,
        ):
            if response.status_code != 200:
                raise _refusal(response, self._url)
            kind = response.headers.get("Content-Type", "")
            chunks: Iterator[bytes] = response.iter_content(CHUNK_BYTES)
            if (boundary := boundary_of(kind)) is not None:
                for part in parts(chunks, boundary):
                    inbox.save(part)
            elif kind.startswith("application/dicom") and not kind.startswith("application/dicom+"):
                inbox.save(chunks)  # one image need not be wrapped, some servers think
            else:
                raise _no_dicomweb(self._url)

    @contextmanager
    def sender(self, paths: Iterable[Path]) -> Iterator[Callable[[Path], Sent]]:
        """STOW-RS, a request for each file: a refusal then belongs to one."""
        del paths
        yield self._store

    def _store(self, path: Path) -> Sent:
        boundary = uuid.uuid4().hex
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        with (
            _translated(self._url),
            Body(path, boundary) as body,
            self._session.post(
                f"{self._url.http}/studies",
                data=body,
                headers={"Content-Type": kind, "Accept": "application/dicom+json"},
                stream=True,
                timeout=self._timeout,
                allow_redirects=False,
            ) as response,
        ):
            if response.status_code in MAY_PASS | {401, 403, 404, 405} or 300 <= response.status_code < 400:
                raise _refusal(response, self._url)
            accepted, code = judge(response)
            return Sent(path, accepted, code)


def _found(match: object, uid: str, instances: str) -> Found:
    """One match (PS3.18 F.2); a UID that is not where it should be is empty, which is not legal either."""
    known = match if isinstance(match, dict) else {}
    values = [(known.get(tag) or {}).get("Value") or [None] for tag in (uid, instances)]
    (name, *_), (number, *_) = values
    return Found(str(name or ""), int(number) if str(number).isdecimal() else None)


@contextmanager
def _translated(url: PacsUrl) -> Iterator[None]:
    """Errors of requests by kind: their text holds the URL, with what was searched for."""
    try:
        yield
    except requests.HTTPError as error:
        if error.response is None:
            raise TransientError("no answer") from None
        raise _refusal(error.response, url) from None
    except (requests.exceptions.InvalidJSONError, AttributeError, TypeError):
        raise _no_dicomweb(url) from None
    except requests.TooManyRedirects:
        raise PacsRefusedError(f"{url.place}: sends us elsewhere. Give the final address.") from None
    except requests.RequestException as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):  # requests has one class for all that goes wrong with TLS
            raise PacsRefusedError(
                f"{url.place}: its certificate is not trusted. Name the authority's file in REQUESTS_CA_BUNDLE."
            ) from None
        raise TransientError(f"no answer, or one that broke off ({type(error).__name__})") from None


def _refusal(response: requests.Response, url: PacsUrl) -> Exception:
    status = response.status_code
    if status in MAY_PASS:
        after = response.headers.get("Retry-After", "")
        return TransientError(f"answered {status}", float(after) if after.isdecimal() else 0.0)
    if status in {401, 403}:
        hint = (
            "Set MEDVIT_PACS_USER and MEDVIT_PACS_PASSWORD, or MEDVIT_PACS_TOKEN; ask who runs the PACS for the right."
        )
        return PacsRefusedError(f"{url.place}: answered {status}, not allowed. {hint}")
    if 300 <= status < 400:
        return PacsRefusedError(f"{url.place}: answered {status}, sends us elsewhere. Give the final address.")
    hint = f"Is {url.path or '/'} the root of its DICOMweb service, and the study still there?"
    return PacsRefusedError(f"{url.place}: answered {status}. {hint}")


def _no_dicomweb(url: PacsUrl) -> PacsRefusedError:
    return PacsRefusedError(
        f"{url.place}: what answers speaks no DICOMweb. Is {url.path or '/'} the root of its DICOMweb service?"
    )
