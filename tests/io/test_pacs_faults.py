"""A PACS that lies, breaks off, is busy or never answers: fakes over both protocols, and nothing outside the folder."""

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ct_builder import Ct, phantom_hu
from pydicom import Dataset, dcmread
from pynetdicom import AE, evt

from medvit.io import PacsError, PacsRefusedError, Retry, open_pacs
from medvit.io.pacs_dimse import FIND, GET
from medvit.records import UsageError

STUDY, SERIES, CT = "1.2.3", "1.2.3.4", "1.2.840.10008.5.1.4.1.1.2"
HOSTILE = ["../../../evil", "1.2/../../../evil", "a\\..\\evil", "1.2\0evil", "1" * 300, "/evil", ""]
JSON = "application/dicom+json"
RELATED = 'multipart/related; type="application/dicom"; boundary=XX'


class Waits(list[float]):
    """What was waited, without waiting."""

    @property
    def retry(self) -> Retry:
        return Retry(tries=4, sleep=self.append, jitter=lambda: 1.0, deadline_s=30)


# ---- a fake DICOMweb server -----------------------------------------------------------------------------------------


@contextmanager
def web(answer: Callable[[Any], Any], tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers with (status, type, body), or leaves the answer to `answer` where that is None."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            seen.append(self)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            done = answer(self)
            if done is not None:
                reply(self, *done)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up here
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"dicomweb+http{'s' if tls else ''}://127.0.0.1:{server.server_port}/web", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(
    handler: Any, status: int, kind: str = JSON, body: bytes = b"", length: int | None = None, **more: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.send_header("Connection", "close")
    for name, value in more.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def matches(uid_tag: str, count_tag: str, *uids: str, count: int = 1) -> bytes:
    return json.dumps(
        [{uid_tag: {"vr": "UI", "Value": [uid]}, count_tag: {"vr": "IS", "Value": [count]}} for uid in uids]
    ).encode()


def archive(images: bytes, kind: str = RELATED, count: int = 1) -> Callable[[Any], Any]:
    """One study of one series."""

    def answer(handler: Any) -> Any:
        path, _, query = handler.path.partition("?")
        if path.endswith("/studies"):
            return 200, JSON, matches("0020000D", "00201208", STUDY) if "offset=0" in query else b"[]"
        if path.endswith("/series"):
            return 200, JSON, matches("0020000E", "00201209", SERIES, count=count) if "offset=0" in query else b"[]"
        return 200, kind, images

    return answer


def multipart(*images: bytes) -> bytes:
    return (
        b"".join(b"--XX\r\nContent-Type: application/dicom\r\n\r\n" + each + b"\r\n" for each in images) + b"--XX--\r\n"
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return Ct(hu=phantom_hu(1)).write(tmp_path / "source")[0]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_busy_twice(status: int) -> None:
    waits, inner = Waits(), archive(b"")
    with web(lambda one: (status, "text/plain", b"") if len(seen) <= 2 else inner(one)) as (url, seen):
        assert [one.study_uid for one in open_pacs(url, retry=waits.retry).find({})] == [STUDY]
    assert waits == [1, 2]


def test_as_long_as_the_server_asks() -> None:
    waits, inner = Waits(), archive(b"")

    def answer(one: Any) -> Any:
        return reply(one, 503, Retry_After="7") if len(seen) == 1 else inner(one)

    with web(answer) as (url, seen):
        open_pacs(url, retry=waits.retry).find({})
    assert waits == [7]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 302, 500])
def test_a_no_is_not_asked_again(status: int, tmp_path: Path) -> None:
    waits = Waits()
    with web(lambda one: reply(one, status, Location="http://127.0.0.1:9/")) as (url, seen):
        pacs = open_pacs(url.replace("://", "://anna:secret77@"), retry=waits.retry)
        with pytest.raises(PacsRefusedError) as caught:
            pacs.find({"PatientID": "Canary77"})
        with pytest.raises(PacsRefusedError):
            pacs.fetch(STUDY, tmp_path / "study")
    assert len(seen) == 2
    assert not waits
    assert caught.value.exit_code == 2
    assert not {"anna", "secret77", "Canary77"} & set(str(caught.value).replace("/", " ").split())
    assert "secret77" not in repr(pacs) + repr(pacs.url) + str(pacs.url)


def test_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with web(archive(b"")) as (url, seen):
        open_pacs(url.replace("://", "://a%40b:p%3Aw@")).find({})
        assert seen[-1].headers["Authorization"] == "Basic YUBiOnA6dw=="
        assert seen[-1].headers["Host"] == url.split("/")[2]
        monkeypatch.setenv("MEDVIT_PACS_TOKEN", "token77")
        open_pacs(url).find({})
        assert seen[-1].headers["Authorization"] == "Bearer token77"
        assert "token77" not in repr(open_pacs(url).url)


def test_certificate_of_an_authority_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pacs -addext subjectAltName=IP:127.0.0.1".split()
    )
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    waits = Waits()
    with web(archive(b""), tls) as (url, seen):
        with pytest.raises(PacsRefusedError, match="certificate is not trusted"):
            open_pacs(url, retry=waits.retry).find({})
        assert not seen
        assert not waits
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert len(open_pacs(url).find({})) == 1


def test_a_server_that_ignores_pages() -> None:
    with web(lambda one: (200, JSON, matches("0020000D", "00201208", "1.2", "1.3"))) as (url, seen):
        assert len(open_pacs(url).find({})) == 2
    assert len(seen) == 2


@pytest.mark.parametrize("uid", HOSTILE)
def test_hostile_uids_over_dicomweb(uid: str, tmp_path: Path, image: Path) -> None:
    inside = tmp_path / "a" / "b"
    with web(lambda one: (200, JSON, matches("0020000D", "00201208", uid))) as (url, _):
        with pytest.raises(PacsError, match="legal UID"):
            open_pacs(url).find({})
        with pytest.raises(UsageError):
            open_pacs(url).fetch(uid, inside / "study")
    with (
        web(lambda one: (200, JSON, matches("0020000E", "00201209", uid))) as (url, _),
        pytest.raises(PacsError, match="legal UID"),
    ):
        open_pacs(url).fetch(STUDY, inside / "study")
    whole = image.read_bytes()
    bad = whole.replace(dcmread(image).SOPInstanceUID.encode(), uid.encode()[:64])
    with web(archive(multipart(bad))) as (url, _):
        assert open_pacs(url).fetch(STUDY, inside / "study") == 1
    assert [len(Path(name).name) for name in tree(tmp_path / "a")] == [68]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]


def broken(how: str, body: bytes) -> Callable[[Any], Any]:
    """An archive whose images break off in the middle."""
    inner = archive(b"")

    def answer(one: Any) -> Any:
        if "/series/" not in one.path:
            return inner(one)
        if how == "length":
            reply(one, 200, RELATED, body[: len(body) // 2], length=len(body))
        elif how == "whole":  # of HTTP, and half a message all the same
            reply(one, 200, RELATED, body[: len(body) // 2])
        else:
            one.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: " + RELATED.encode() + b"\r\n")
            one.wfile.write(b"Connection: close\r\n\r\n" if how == "close" else b"Transfer-Encoding: chunked\r\n\r\n")
            one.wfile.write(body[:900] if how == "close" else b"384\r\n" + body[:900] + b"\r\n")
        return None

    return answer


@pytest.mark.parametrize("how", ["length", "whole", "close", "chunked"])
def test_broken_off_in_the_middle(how: str, tmp_path: Path, image: Path) -> None:
    waits = Waits()
    whole = multipart(image.read_bytes(), image.read_bytes())
    with web(broken(how, whole)) as (url, _), pytest.raises(PacsError, match=r"broke.*4 tries"):
        open_pacs(url, retry=waits.retry).fetch(STUDY, tmp_path / "study")
    assert waits == [1, 2, 4]
    assert tree(tmp_path) == ["source/IM0000.dcm"]


def test_fewer_than_it_says(tmp_path: Path, image: Path) -> None:
    lying = archive(multipart(image.read_bytes()), count=2)
    with web(lying) as (url, _), pytest.raises(PacsError, match="gave 1 images of a series that has 2"):
        open_pacs(url, retry=Waits().retry).fetch(STUDY, tmp_path / "study")
    assert tree(tmp_path) == ["source/IM0000.dcm"]


def test_one_image_need_not_be_wrapped(tmp_path: Path, image: Path) -> None:
    with web(archive(image.read_bytes(), "application/dicom")) as (url, _):
        assert open_pacs(url).fetch(STUDY, tmp_path / "study") == 1
    assert next((tmp_path / "study").rglob("*.dcm")).read_bytes() == image.read_bytes()


def test_larger_than_allowed(tmp_path: Path, image: Path) -> None:
    lying = archive(multipart(image.read_bytes()))
    with web(lying) as (url, _), pytest.raises(PacsError, match="larger than 1,000 bytes"):
        open_pacs(url).fetch(STUDY, tmp_path / "study", limit_bytes=1000)
    assert tree(tmp_path) == ["source/IM0000.dcm"]


def test_a_page_instead_of_images(tmp_path: Path, image: Path) -> None:
    page = (200, "text/html", b"<html>please log in</html>")
    with web(lambda one: page) as (url, _):
        pacs = open_pacs(url)
        with pytest.raises(PacsRefusedError, match="speaks no DICOMweb"):
            pacs.find({})
        assert [(one.accepted, one.code) for one in pacs.send([image])] == [(False, "UNCONFIRMED")]
    inner = archive(b"")
    with (
        web(lambda one: page if "/series/" in one.path else inner(one)) as (url, _),
        pytest.raises(PacsRefusedError, match="speaks no DICOMweb"),
    ):
        open_pacs(url).fetch(STUDY, tmp_path / "study")


def failed(reason: int | None) -> bytes:
    item = {} if reason is None else {"00081197": {"vr": "US", "Value": [reason]}}
    return json.dumps({"00081198": {"vr": "SQ", "Value": [item]}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b'{"00081199": {"vr": "SQ", "Value": [{}]}}', (True, "")),
        (409, failed(0x0111), (True, "ALREADY_THERE")),
        (202, failed(0xA900), (False, "STATUS_A900")),
        (409, failed(None), (False, "STATUS_0000")),
        (409, b"", (False, "HTTP_409")),
        (400, b"no", (False, "HTTP_400")),
        (413, b"", (False, "HTTP_413")),
        (200, b"", (False, "UNCONFIRMED")),
        (200, b"[" * 100_000, (False, "UNCONFIRMED")),
    ],
)
def test_what_became_of_a_file(status: int, body: bytes, expected: tuple[bool, str], image: Path) -> None:
    with web(lambda one: (status, JSON, body)) as (url, seen):
        (one,) = open_pacs(url).send([image])
    assert (one.accepted, one.code) == expected
    assert image.read_bytes() in seen[0].body  # type: ignore[attr-defined]


def test_out_of_resources_is_asked_again(image: Path) -> None:
    waits = Waits()
    answers = iter([failed(0xA700), failed(0xA700), b'{"00081199": {}}'])
    with web(lambda one: (200, JSON, next(answers))) as (url, _):
        assert open_pacs(url, retry=waits.retry).send([image])[0].accepted
    assert waits == [1, 2]


# ---- both protocols -------------------------------------------------------------------------------------------------


@contextmanager
def listening(then: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where each connection is handed to `then`, and kept open until the end."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    then(kept[-1])
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for each in kept:
                each.close()


@pytest.mark.parametrize("scheme", ["dicomweb+http://127.0.0.1:{}", "dimse://ANY@127.0.0.1:{}"])
@pytest.mark.parametrize("then", [lambda one: None, lambda one: one.close(), lambda one: one.sendall(b"\xff" * 50)])
def test_no_answer_or_nonsense(scheme: str, then: Callable[[socket.socket], None]) -> None:
    waits = Waits()
    with listening(then) as port:
        start = time.monotonic()
        with pytest.raises(PacsError, match=r"4 tries"):
            open_pacs(scheme.format(port), retry=waits.retry, connect_s=0.3, read_s=0.3).find({"PatientID": "Canary77"})
    assert time.monotonic() - start < 15
    assert waits == [1, 2, 4]


def test_a_byte_at_a_time_ends_at_the_deadline(tmp_path: Path, image: Path) -> None:
    inner = archive(b"")

    def answer(one: Any) -> Any:
        if "/series/" not in one.path:
            return inner(one)
        reply(one, 200, RELATED, multipart(image.read_bytes())[:200], length=10**9)
        for _ in range(200):
            one.wfile.write(b"x" * 2000)
            time.sleep(0.02)
        return None

    with web(answer) as (url, _), pytest.raises(PacsError, match=r"not finished within 0\.5 s"):
        open_pacs(url, retry=Retry(deadline_s=0.5)).fetch(STUDY, tmp_path / "study")
    assert tree(tmp_path) == ["source/IM0000.dcm"]


# ---- a fake DIMSE server --------------------------------------------------------------------------------------------


@contextmanager
def dimse(
    get: tuple[Dataset, ...] = (),
    uids: tuple[str, ...] = (SERIES,),
    stores: list[int] | None = None,
    offer: bool = True,
) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    def on_find(event: Any) -> Iterator[tuple[int, Dataset | None]]:
        asked.append("find")
        level = event.identifier.QueryRetrieveLevel
        for uid in uids:
            match = Dataset()
            match.QueryRetrieveLevel = level
            name = "StudyInstanceUID" if level == "STUDY" else "SeriesInstanceUID"
            match.add_new(name, "UI", uid)
            yield 0xFF00, match

    def on_get(event: Any) -> Iterator[Any]:
        asked.append("get")
        yield len(get)
        for dataset in get:
            yield 0xFF00, dataset

    def on_store(event: Any) -> int:
        asked.append("store")
        assert stores is not None
        return stores.pop(0)

    entity = AE(ae_title="FAKE")
    entity.add_supported_context(FIND)
    if offer:
        entity.add_supported_context(GET)
    entity.add_supported_context(CT, scu_role=True, scp_role=True)
    entity.require_called_aet = True
    entity.require_calling_aet = ["MEDVIT"]
    handlers = [(evt.EVT_C_FIND, on_find), (evt.EVT_C_GET, on_get), (evt.EVT_C_STORE, on_store)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        yield f"dimse://FAKE@127.0.0.1:{server.socket.getsockname()[1]}", asked
    finally:
        server.shutdown()


@pytest.mark.filterwarnings("ignore")  # of the server, which is made to send what is illegal
@pytest.mark.parametrize("uid", HOSTILE)
def test_hostile_uids_over_dimse(uid: str, tmp_path: Path, image: Path) -> None:
    bad = dcmread(image)
    bad.SOPInstanceUID = uid or "1.2"
    with dimse((bad,)) as (url, asked):
        try:
            count = open_pacs(url, retry=Waits().retry, read_s=3).fetch(STUDY, tmp_path / "a" / "b" / "study")
        except PacsError:
            count = 0
    assert "get" in asked
    assert [len(Path(name).name) for name in tree(tmp_path / "a")] == [68] * count
    assert {path.name for path in tmp_path.iterdir()} == {"a", "source"}
    with dimse(uids=(uid,)) as (url, _), pytest.raises(PacsError, match="legal UID"):
        open_pacs(url, read_s=3).find({})


def test_duplicate_busy_and_refused_over_dimse(image: Path) -> None:
    waits = Waits()
    with dimse(stores=[0x0111, 0xA700, 0x0000, 0xB000, 0xA900, 0xC123]) as (url, asked):
        sent = open_pacs(url, retry=waits.retry).send([image] * 5)
    expected = [(True, "ALREADY_THERE"), (True, ""), (True, ""), (False, "STATUS_A900"), (False, "STATUS_C123")]
    assert [(one.accepted, one.code) for one in sent] == expected
    assert waits == [1]
    assert len(asked) == 6


def test_what_a_dimse_server_does_not_offer(tmp_path: Path, image: Path) -> None:
    with dimse(offer=False) as (url, _):
        with pytest.raises(PacsRefusedError, match="no C-GET"):
            open_pacs(url).fetch(STUDY, tmp_path / "study")
        with pytest.raises(PacsRefusedError, match="not know us as STRANGER"):
            open_pacs(f"{url}?aet=STRANGER").find({})
        other = dcmread(image)
        other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        other.save_as(tmp_path / "other.dcm")
        assert [one.code for one in open_pacs(url).send([tmp_path / "other.dcm"])] == ["NOT_SUPPORTED"]
    assert tree(tmp_path) == ["other.dcm", "source/IM0000.dcm"]


def test_a_full_disk(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medvit.io.pacs_inbox.os.fsync", full)
    with dimse((dcmread(image),)) as (url, _), pytest.raises(OSError, match="No space"):
        open_pacs(url).fetch(STUDY, tmp_path / "study")
    with web(archive(multipart(image.read_bytes()))) as (url, _), pytest.raises(OSError, match="No space"):
        open_pacs(url).fetch(STUDY, tmp_path / "study")
    assert tree(tmp_path) == ["source/IM0000.dcm"]
