"""The index of a folder: what it remembers equals what a fresh look would find, and it never hides a change."""

import os
import shutil
import sqlite3
import stat
import threading
from random import Random

import pytest
from ct_builder import Ct

from medvit.io import elements as elements_module
from medvit.io import headers as headers_module
from medvit.io import index as index_module
from medvit.io import read, scan_folder
from medvit.records import ReasonCode


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "RACY_NS", -(10**9))  # files of a test are as fresh as the scan
    Ct().write(tmp_path / "ct" / "a")
    Ct(uid=2, study=2, patient="Schmidt-7", slopes=(1.0, 0.5), intercept=-1000).write(tmp_path / "ct" / "b" / "c")
    (tmp_path / "ct" / "notes.txt").write_text("hello")
    (tmp_path / "ct" / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 40)
    return tmp_path / "ct"


@pytest.fixture
def opened(monkeypatch):
    """Names of files whose header was read."""
    names = []
    plain = elements_module.read_elements

    def counting(path, name):
        names.append(name)
        return plain(path, name)

    monkeypatch.setattr(headers_module, "read_elements", counting)
    return names


def told(inventory):
    return inventory.files, [(s.key, s.outcome, s.codes, s.files, s.header, s.shape, s.stamp) for s in inventory.series]


def test_a_second_scan_opens_nothing_and_finds_the_same(folder, tmp_path, opened):
    fresh = told(scan_folder(folder))
    first = told(scan_folder(folder, index=tmp_path / "index.sqlite"))
    opened.clear()
    second = scan_folder(folder, index=tmp_path / "index.sqlite")
    assert opened == []
    assert told(second) == first == fresh
    for series in second.series:
        assert read(series).hu.shape == series.shape


def test_only_what_changed_is_read_again(folder, tmp_path, opened):
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    changed = folder / "a" / "IM0003.dcm"
    raw = changed.read_bytes()
    changed.write_bytes(raw.replace(b"Acme", b"Bcme"))
    (folder / "a" / "IM0004.dcm").unlink()
    Ct(uid=3, study=3).write(folder / "new", only=[0])
    opened.clear()
    scan_folder(folder, index=index)
    assert opened == ["a/IM0003.dcm", "new/IM0000.dcm"]
    opened.clear()
    scan_folder(folder, index=index)
    assert opened == []
    assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))


def test_same_size_and_same_modification_time_do_not_hide_a_change(folder, tmp_path):
    """The time of change of the inode tells: a copy tool that restores times cannot set it."""
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    path = folder / "a" / "IM0003.dcm"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Mueller-0815", b"Schmidt-0815"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (series,) = (s for s in scan_folder(folder, index=index).series if s.study_uid.endswith(".1"))
    assert series.codes == (ReasonCode.PATIENT_CONFLICT,)


def test_a_damaged_index_is_made_anew(folder, tmp_path):
    index = tmp_path / "index.sqlite"
    index.write_bytes(b"no database at all" * 100)
    assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))


def test_the_index_of_another_folder_is_not_believed(folder, tmp_path):
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    Ct(uid=9, study=9).write(tmp_path / "other" / "a")
    assert told(scan_folder(tmp_path / "other", index=index)) == told(scan_folder(tmp_path / "other"))


def test_names_that_are_no_text_are_no_hindrance(folder, tmp_path):
    (folder / os.fsdecode(b"\xff\xfe.dcm")).write_bytes((folder / "a" / "IM0000.dcm").read_bytes())
    Ct(uid=5, study=5).write(folder / os.fsdecode(b"\xff\xfe"))
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))


def test_the_index_is_for_its_owner_alone(folder, tmp_path):
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    assert stat.S_IMODE(index.stat().st_mode) == 0o600


def test_a_file_that_changed_just_now_is_read_again_next_time(folder, tmp_path, opened, monkeypatch):
    """A second change within one tick of the clock would leave its stamp as it is."""
    monkeypatch.setattr(index_module, "RACY_NS", 10**12)
    for _ in range(2):
        opened.clear()
        scan_folder(folder, index=tmp_path / "index.sqlite")
        assert len(opened) == 26


def test_an_index_that_cannot_be_written_is_done_without(folder, tmp_path, caplog):
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    with sqlite3.connect(index) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkey = pytest.MonkeyPatch()
        plain = sqlite3.connect
        monkey.setattr(sqlite3, "connect", lambda path: plain(path, timeout=0))
        assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))
        monkey.undo()
    assert "not used this time" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_two_scans_at_once_leave_an_index_that_is_right(folder, tmp_path):
    """Both name the same shared header alike, and neither trusts the other's numbers."""
    index = tmp_path / "index.sqlite"
    threads = [threading.Thread(target=scan_folder, args=(folder,), kwargs={"index": index}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))


def test_a_folder_that_is_gone_leaves_the_index(folder, tmp_path):
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    shutil.rmtree(folder / "b")
    assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))
    with sqlite3.connect(index) as database:
        assert {name for (name,) in database.execute("SELECT folder FROM folders")} == {"", "a"}


def test_a_damaged_part_is_read_again(folder, tmp_path, opened):
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    with sqlite3.connect(index) as database:
        database.execute("UPDATE folders SET content = substr(content, 1, 100) || x'00' WHERE folder = 'a'")
    opened.clear()
    assert told(scan_folder(folder, index=index)) == told(scan_folder(folder))
    assert opened.count("a/IM0000.dcm") == 2
    assert opened.count("b/c/IM0000.dcm") == 1


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE shared SET content = replace(content, 'Mueller', 'Schmidt')",
        "UPDATE shared SET content = replace(content, '0.7', '0.9')",
        "UPDATE shared SET content = substr(content, 1, 50)",
        "UPDATE shared SET content = x'00'",
        "DELETE FROM shared",
        "UPDATE folders SET content = 7",
    ],
)
def test_damage_of_any_row_is_found_and_mended(folder, tmp_path, opened, damage):
    """One changed byte may be another patient or another pixel spacing."""
    index = tmp_path / "index.sqlite"
    fresh = told(scan_folder(folder, index=index))
    with sqlite3.connect(index) as database:
        database.execute(damage)
    for _ in range(2):
        opened.clear()
        assert told(scan_folder(folder, index=index)) == fresh
    assert opened == []


def test_an_index_with_damage_at_any_byte_changes_nothing(folder, tmp_path):
    index, random = tmp_path / "index.sqlite", Random(5)
    fresh = told(scan_folder(folder, index=index))
    whole = index.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        index.write_bytes(damaged)
        assert told(scan_folder(folder, index=index)) == fresh


def test_many_files_in_one_folder_are_kept_in_several_parts(folder, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK", 5)
    index = tmp_path / "index.sqlite"
    scan_folder(folder, index=index)
    opened.clear()
    assert told(scan_folder(folder, index=index))[0] == told(scan_folder(folder))[0]
    assert len(opened) == 26
