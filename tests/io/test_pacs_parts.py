"""Addresses, queries, waiting and multipart messages: no network."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvit.io.pacs_multipart import boundary_of, parts
from medvit.io.pacs_query import is_uid, study_query
from medvit.io.pacs_retry import Retry, TransientError
from medvit.io.pacs_url import parse_url
from medvit.records import UsageError


def test_addresses() -> None:
    one = parse_url("dicomweb+https://anna:s%40c@pacs.example/dicom-web/", {})
    assert (one.http, one.user, one.password) == ("https://pacs.example:443/dicom-web", "anna", "s@c")
    assert "s@c" not in f"{one} {one!r}"
    one = parse_url("dimse://ORTHANC@[::1]:4242?aet=OURS", {})
    assert (one.aet, one.our_aet, one.place) == ("ORTHANC", "OURS", "[::1]:4242")
    assert parse_url("dimse://A@h", {}).port == 104
    one = parse_url("dicomweb+http://h", {"MEDVIT_PACS_USER": "u", "MEDVIT_PACS_PASSWORD": "p"})
    assert (one.user, one.password) == ("u", "p")


@pytest.mark.parametrize(
    "text",
    """https://pacs/x dimse://pacs:4242 dimse://TITLETHATISMUCHTOOLONG@pacs dimse://A:secret77@pacs dimse://A@pacs/path
    dimse://A@pacs?other=1 dicomweb+http:///path dicomweb+http://u:secret77@h:99999 dicomweb+http://u:secret77#@h
    dicomweb+http://u:secret77@h:x dicomweb+http://h/?a=b dimse://A@h?aet= nonsense dicomweb+http://[::1""".split(),
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match=r"saw .*, need .*Example: dicomweb\+https://") as caught:
        parse_url(text, {})
    assert "secret77" not in str(caught.value)


def test_queries() -> None:
    assert study_query({"StudyDate": "20261127-"}) == {"ModalitiesInStudy": "CT", "StudyDate": "20261127-"}
    assert study_query({"ModalitiesInStudy": "PT"}) == {"ModalitiesInStudy": "PT"}
    with pytest.raises(UsageError, match="Did you mean PatientID"):
        study_query({"PatientId": "1"})
    with pytest.raises(UsageError, match="Did you mean ModalitiesInStudy"):
        study_query({"Modalities": "CT"})
    for value in ("", " ", "a\n", "a\0"):
        with pytest.raises(UsageError, match="PatientID is empty"):
            study_query({"PatientID": value})


@pytest.mark.parametrize("text", ["", "..", "1..2", "1/2", "1" * 65, "1.2\n", "\u0661.2", ".1", None, 1])
def test_no_uids(text: object) -> None:
    assert not is_uid(text)


def test_waits_grow_to_a_bound() -> None:
    longest = Retry(first_s=1, longest_s=10, jitter=lambda: 1.0)
    shortest = Retry(first_s=1, longest_s=10, jitter=lambda: 0.0)
    assert [longest.wait_s(tried) for tried in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert [shortest.wait_s(tried) for tried in range(1, 4)] == [0.5, 1, 2]
    assert longest.wait_s(1, after_s=5) == 5
    assert longest.wait_s(1, after_s=9999) == 10


@given(
    bodies=st.lists(st.binary(max_size=60) | st.sampled_from([b"\r\n--X", b"--", b"\r\n", b"\r\n--XX-"]), max_size=4),
    size=st.integers(1, 40),
    preamble=st.sampled_from([b"", b"\r\n", b"hello\r\n"]),
)
def test_parts_come_out_however_they_are_cut(bodies: list[bytes], size: int, preamble: bytes) -> None:
    text = b"".join(b"--XYZ\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n" for body in bodies)
    text = preamble + text + b"--XYZ--\r\n"
    assert [b"".join(part) for part in parts(cut(text, size), b"XYZ")] == bodies
    for end in range(len(preamble), len(text) - 4, 7):
        with pytest.raises(TransientError):
            [b"".join(part) for part in parts(cut(text[:end], size), b"XYZ")]


def cut(text: bytes, size: int) -> list[bytes]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def test_boundaries() -> None:
    assert boundary_of('multipart/related; type="application/dicom"; boundary="a-b"') == b"a-b"
    assert boundary_of("Multipart/Related;BOUNDARY=x") == b"x"
    assert boundary_of("text/html; boundary=x") is None
    assert boundary_of("multipart/related") is None
