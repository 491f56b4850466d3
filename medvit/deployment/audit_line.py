"""One entry of an audit: what it may say, and the sealed line that it becomes."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_HEX = re.compile("[0-9a-f]{8,64}")
_CODE = re.compile("[A-Za-z][A-Za-z0-9_]{0,63}")
_COUNT = None

FIELDS: Mapping[str, re.Pattern[str] | None] = {
    # what it is about: pseudonyms and hashes
    "case_id": _HEX,
    "patient_id": _HEX,
    "study": _HEX,
    "series": _HEX,
    "model_sha256": _HEX,
    "config_sha256": _HEX,
    "file_sha256": _HEX,
    # what became of it
    "outcome": _CODE,
    "code": _CODE,
    "codes": _CODE,
    "flags": _CODE,
    "predicted": re.compile(r"[^\x00-\x1f\x7f]{1,64}"),  # a class of the model
    "kind": _CODE,
    "file": re.compile(r"[0-9.]{1,64}\.dcm"),  # a result is named by its UID
    "destination": re.compile(r"[\w .-]{1,64}", re.ASCII),  # as the configuration names it
    "version": re.compile(r"[\w.+-]{1,40}", re.ASCII),
    "status": _COUNT,
    "exit_code": _COUNT,
    "attempt": _COUNT,
    "count": _COUNT,
    "seen": _COUNT,
    "used": _COUNT,
    "quarantined": _COUNT,
    "rejected": _COUNT,
    "skipped": _COUNT,
    "written": _COUNT,
    "sent": _COUNT,
    "failed": _COUNT,
    "bytes_cut": _COUNT,
}
"""Name -> form of its value, or of each in a list; None: a whole number from 0."""

_PURPOSE = b"medvit audit, version 1"
_HASH = b',"hash":"'
_TAIL = len(_HASH) + 64 + len(b'"}')


class Head(NamedTuple):
    """An end of a chain: how many entries, and the hash of the last; keep it where the file is not."""

    entries: int
    hash: str


START = Head(0, "0" * 64)


def check_field(name: str, value: object) -> None:
    """Refuse what is not of the list.

    Raises:
        ValueError: a programming error; the value is not told.
    """
    if name not in FIELDS:
        raise ValueError(f"no field {name!r} in an audit: {', '.join(FIELDS)}")
    form = FIELDS[name]
    if form is None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}: a whole number from 0")
        return
    values = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(one, str) and form.fullmatch(one) for one in values):
        raise ValueError(f"{name}: not of the form {form.pattern}")  # the value is not shown: it may be identity


def derive_key(key: bytes) -> bytes:
    """The key of chains: one purpose, one key, so that no hash of the site's passes for another kind."""
    if not key:
        raise ValueError("the site's key is empty: anybody could write such a chain")
    return hmac.digest(key, _PURPOSE, "sha256")


def seal(entry: Mapping[str, Any], key: bytes) -> bytes:
    """The line of an entry, without its end: JSON in the order of its names, the hash of all before it last."""
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode("ascii")
    return text[:-1] + _HASH + hmac.digest(key, text, "sha256").hex().encode() + b'"}'


def unseal(line: bytes, key: bytes) -> dict[str, Any] | None:
    """The entry of a line; None: not one that was sealed with this key, to the byte."""
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    hashed = hmac.digest(key, body, "sha256").hex().encode()
    if not hmac.compare_digest(tail, _HASH + hashed + b'"}'):
        return None
    entry: dict[str, Any] = json.loads(body)  # what was sealed with the key is an entry
    return entry


def hash_of(line: bytes) -> str:
    """The hash that a sealed line ends with."""
    return line[-66:-2].decode("ascii")


def head_of(entry: Mapping[str, Any], line: bytes) -> Head:
    """The end of a chain whose last entry this is."""
    return Head(entry["seq"], hash_of(line))
