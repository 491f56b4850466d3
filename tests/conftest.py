"""Fixtures of all tests: a fixed site key, and the real CT where there is some."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from orthanc import Orthanc, running

LONG = ("notebooks/", "killed_batches", "test_kills", "test_cluster", "test_pacs", "test_processes", "test_fairness")
"""Files that take long begin first: the last one to run would keep one of two processes waiting for it."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.fixture(autouse=True, scope="session")
def site_key():
    """Pseudonyms are the same in every run, and no test makes a key file in the home of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVIT_SITE_KEY", "test")
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with `data/` and `weights/`; mark the test `realdata` as well."""
    folder = os.environ.get("MEDVIT_REAL_DATA", "")
    if not folder or not (Path(folder) / "data").is_dir():
        pytest.skip("MEDVIT_REAL_DATA names no folder with real CT")
    return Path(folder) / "data"


@pytest.fixture(scope="session")
def orthanc_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """One PACS for the whole run; use `orthanc`, which is empty at the start of a test."""
    with running(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


@pytest.fixture
def orthanc(orthanc_server: Orthanc) -> Orthanc:
    """A real PACS on loopback, empty: `.dicomweb` and `.dimse` are its addresses."""
    orthanc_server.reset()
    return orthanc_server
