"""A real PACS for tests: Debian's Orthanc on loopback, with its DICOMweb plugin, in a folder of its own."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
READY_S = 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Orthanc:
    """One server; `start` and `stop` it to see what a client does meanwhile."""

    folder: Path
    http_port: int
    dicom_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def rest(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def dicomweb(self) -> str:
        return f"dicomweb+http://127.0.0.1:{self.http_port}/dicom-web"

    @property
    def dimse(self) -> str:
        return f"dimse://ORTHANC@127.0.0.1:{self.dicom_port}?aet=MEDVIT"

    def ask(self, path: str, data: bytes | None = None, method: str | None = None) -> Any:
        """The answer of the REST interface, parsed where it is JSON."""
        request = urllib.request.Request(self.rest + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            body = response.read()
        try:
            return json.loads(body)
        except ValueError:
            return body

    def instances(self) -> int:
        return int(self.ask("/statistics")["CountInstances"])

    def studies(self) -> list[str]:
        """UIDs of the studies that it has."""
        return sorted(each["MainDicomTags"]["StudyInstanceUID"] for each in self.ask("/studies?expand"))

    def reset(self) -> None:
        for name in self.ask("/patients"):
            self.ask(f"/patients/{name}", method="DELETE")

    def start(self) -> None:
        configuration = {
            "Name": "medvit tests",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "HttpPort": self.http_port,
            "DicomPort": self.dicom_port,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DefaultEncoding": "Utf8",
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(configuration))
        with (self.folder / "orthanc.log").open("ab") as log:
            self.process = subprocess.Popen([_program(), str(path)], stdout=log, stderr=log, cwd=self.folder)
        self._wait()

    def _wait(self) -> None:
        ends = time.monotonic() + READY_S
        while time.monotonic() < ends:
            try:
                self.ask("/statistics")
                return
            except OSError:
                if self.process is None or self.process.poll() is not None:
                    break
                time.sleep(0.1)
        self.stop()
        raise RuntimeError((self.folder / "orthanc.log").read_text()[-2000:])

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _program() -> str:
    return shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin") or ""


@contextmanager
def running(folder: Path) -> Iterator[Orthanc]:
    """A server for as long as the context lasts; the test is skipped where there is none."""
    if not _program() or not PLUGIN.exists():
        pytest.skip("Debian package orthanc or orthanc-dicomweb is not installed")
    server = Orthanc(folder, free_port(), free_port())
    try:
        server.start()
        yield server
    finally:
        server.stop()
