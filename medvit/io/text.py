r"""Text of a DICOM header: bytes under a declared character set (PS3.5 6.1, PS3.3 C.12.1.1.2) -> str, never with '?'.

What does not fit its declaration is kept as escapes (`\xe4`) and told; copying identity into results goes from the raw
bytes, not from here.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any


class TextReader:
    """Decodes the text of one header.

    Args:
        declared: value of SpecificCharacterSet, raw; several terms allow ISO 2022 escapes.

    Attributes:
        fault: whether some text did not fit the declared character set.
    """

    def __init__(self, declared: bytes) -> None:
        self.declared, self.fault = declared, False

    def read(self, values: dict[str, Any], keyword: str) -> str:
        """The value as text; empty where absent."""
        raw = values.get(keyword)
        if not isinstance(raw, bytes):
            return ""
        if raw.isascii() and b"\x1b" not in raw:
            return escaped(raw)
        decoded = self._decode(raw)
        if decoded is None:
            self.fault = True
            return escaped(raw)
        return decoded.strip(" \0")

    def _decode(self, raw: bytes) -> str | None:
        from pydicom.charset import convert_encodings, decode_bytes, python_encoding  # noqa: PLC0415  most text is ASCII

        terms = [term.strip() for term in self.declared.decode("ascii", "replace").split("\\")]
        if not any(terms) or any(term not in python_encoding for term in terms):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pydicom warns where it would replace
            try:
                decoded = decode_bytes(raw, convert_encodings(terms), {0x5C, 0x3D, 0x5E})  # delimiters \ = ^
            except (UserWarning, UnicodeError, LookupError):
                return None
        return None if "\ufffd" in decoded else decoded


@lru_cache(maxsize=1024)
def escaped(raw: bytes) -> str:
    """ASCII, with other bytes as escapes; one object for what is met again, for a folder repeats itself."""
    return raw.decode("ascii", "backslashreplace").strip(" \0")


def sop_class_name(uid: str) -> str:
    """The name of a SOP class, or its UID where unknown."""
    from pydicom.uid import UID_dictionary  # noqa: PLC0415  only for files that are no CT

    known = UID_dictionary.get(uid)
    return known[0] if known else "unknown SOP class"
