"""Where a PACS is, as one line: `dicomweb+https://host/path` or `dimse://AE@host:port`.

User, password and token are part of the record and never of its text. They are better given in the environment
(MEDVIT_PACS_USER, MEDVIT_PACS_PASSWORD, MEDVIT_PACS_TOKEN): a command line can be read by everybody on the machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from medvit.records import UsageError

EXAMPLES = "dicomweb+https://pacs.example/dicom-web or dimse://ORTHANC@pacs.example:4242?aet=MEDVIT"

OUR_AET = "MEDVIT"
"""Application entity title that we call ourselves without `?aet=`."""

DIMSE_PORT = 104
"""Well-known port of DICOM (PS3.8 9.1.1)."""

DEFAULT_PORTS: Mapping[str, int] = {"dicomweb+http": 80, "dicomweb+https": 443, "dimse": DIMSE_PORT}


@dataclass(frozen=True, kw_only=True)
class PacsUrl:
    """The parts of a PACS's address.

    Attributes:
        scheme: `dicomweb+http`, `dicomweb+https` or `dimse`.
        host: name or address, without brackets.
        port: TCP.
        path: of DICOMweb, without a slash at its end.
        aet: of the PACS (DIMSE).
        our_aet: by which the PACS knows us (DIMSE).
        user: for DICOMweb; empty: none. `password` and `token` (Bearer) too.
        password: see `user`.
        token: see `user`.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    aet: str = ""
    our_aet: str = OUR_AET
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def __str__(self) -> str:
        """The address without credentials."""
        title = f"{self.aet}@" if self.aet else ""
        return f"{self.scheme}://{title}{self.place}{self.path}"

    @property
    def place(self) -> str:
        """`host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def http(self) -> str:
        """The root of the DICOMweb service, without credentials."""
        return f"{self.scheme.removeprefix('dicomweb+')}://{self.place}{self.path}"


def parse_url(text: str, environment: Mapping[str, str] = os.environ) -> PacsUrl:
    """The parts of an address; credentials that it lacks are taken from the environment.

    Raises:
        UsageError: it is none; said without what could be a password.
    """
    try:
        split = urlsplit(text.strip())
        port = split.port
    except ValueError:
        raise _wrong("an address that cannot be taken apart", "a port of 1 to 65535 after a host") from None
    if split.scheme not in DEFAULT_PORTS:
        raise _wrong(f"scheme {split.scheme!r}", f"one of {', '.join(DEFAULT_PORTS)}")
    if not split.hostname or not re.fullmatch(r"[\w.:%-]+", split.hostname, re.ASCII):
        raise _wrong("no host" if not split.hostname else "a host with other characters", "a host name or address")
    if port == 0:
        raise _wrong("port 0", "a port of 1 to 65535")
    if split.fragment or (split.query and split.scheme != "dimse"):
        raise _wrong("'?' or '#' in the address", "percent signs for them in a password (%3F, %23), else none")
    parse = _dimse if split.scheme == "dimse" else _dicomweb
    return parse(split, port or DEFAULT_PORTS[split.scheme], environment)


def _dicomweb(split: SplitResult, port: int, environment: Mapping[str, str]) -> PacsUrl:
    user, password = unquote(split.username or ""), unquote(split.password or "")
    given = bool(user or password)
    if not given:
        user, password = environment.get("MEDVIT_PACS_USER", ""), environment.get("MEDVIT_PACS_PASSWORD", "")
    return PacsUrl(
        scheme=split.scheme,
        host=split.hostname or "",
        port=port,
        path=split.path.rstrip("/"),
        user=user,
        password=password,
        token="" if given else environment.get("MEDVIT_PACS_TOKEN", ""),
    )


def _dimse(split: SplitResult, port: int, _: Mapping[str, str]) -> PacsUrl:
    if split.password is not None:
        raise _wrong("a password", "none: DIMSE knows AE titles only")
    if split.path.strip("/"):
        raise _wrong("a path after the port", "none")
    extra = parse_qs(split.query, keep_blank_values=True)
    if extra.keys() - {"aet"}:
        raise _wrong("something other than aet after '?'", "?aet= and the title by which the PACS knows you")
    return PacsUrl(
        scheme=split.scheme,
        host=split.hostname or "",
        port=port,
        aet=_title(unquote(split.username or ""), "before the @, the title of the PACS"),
        our_aet=_title(extra.get("aet", [OUR_AET])[-1], "after ?aet="),
    )


def _title(text: str, where: str) -> str:
    """An application entity title: 1 to 16 characters of ASCII without backslash and control (PS3.5 6.2, AE)."""
    if not re.fullmatch(r"[ -\[\]-~]{1,16}", text) or not text.strip():
        raise _wrong("no AE title" if not text else "an AE title that is none", f"1 to 16 ASCII characters {where}")
    return text.strip()


def _wrong(seen: str, needed: str) -> UsageError:
    return UsageError(f"address of the PACS: saw {seen}, need {needed}. Example: {EXAMPLES}.")
