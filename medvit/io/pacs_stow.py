"""STOW-RS (PS3.18 10.5): the body of a request, from a file in chunks, and what the answer says."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from medvit.io.pacs_retry import TransientError

FAILED, STORED, REASON = "00081198", "00081199", "00081197"
"""Failed SOP Sequence, Referenced SOP Sequence, Failure Reason (PS3.18 table I.1-1)."""

DUPLICATE = 0x0111
"""Duplicate SOP Instance (PS3.7 C.5.7)."""

ANSWER_LIMIT_BYTES = 1 << 20


class Body:
    """A multipart body of one file that knows its length, so that it is sent with one: not every server takes chunks.

    Args:
        path: the file.
        boundary: of the message.
    """

    def __init__(self, path: Path, boundary: str) -> None:
        self._head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        self._path = path

    def __enter__(self) -> Self:
        self._stream = self._path.open("rb")
        self._length = len(self._head) + self._path.stat().st_size + len(self._tail)
        self._left = [self._head, None, self._tail]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        """The next bytes; empty at the end."""
        while self._left:
            part = self._stream.read(size) if self._left[0] is None else self._left[0]
            if self._left[0] is not None or not part:
                self._left.pop(0)
            if part:
                return part
        return b""


def judge(response: requests.Response) -> tuple[bool, str]:
    """Whether the PACS has the file now, and the code of `Sent`.

    Raises:
        TransientError: it is out of resources.
    """
    answer = _answer(response)
    reason = _reason(answer)
    if reason == DUPLICATE:
        return True, "ALREADY_THERE"
    if reason is not None and 0xA700 <= reason <= 0xA7FF:
        raise TransientError(f"out of resources (status {reason:04X})")
    if reason is not None:
        return False, f"STATUS_{reason:04X}"
    if response.status_code not in {200, 202}:
        return False, f"HTTP_{response.status_code}"
    # a proxy's or portal's page is 200, too
    return (True, "") if STORED in answer else (False, "UNCONFIRMED")


def _answer(response: requests.Response) -> dict[str, Any]:
    """DICOM JSON of an answer; empty where it is anything else."""
    text = b""
    for chunk in response.iter_content(1 << 16):
        text += chunk
        if len(text) > ANSWER_LIMIT_BYTES:
            return {}
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    answer = answer[0] if isinstance(answer, list) and answer else answer
    return answer if isinstance(answer, dict) else {}


def _reason(answer: dict[str, Any]) -> int | None:
    """Failure reason of the file; 0: failed, and not said why; None: not failed."""
    try:
        failed = answer.get(FAILED, {}).get("Value", [])
        return int(failed[0].get(REASON, {}).get("Value", [0])[0]) if failed else None
    except (AttributeError, LookupError, TypeError, ValueError):
        return 0
