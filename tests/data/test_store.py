"""Entries are whole, true to their checksum, made once by however many processes, and never half visible."""

import errno
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medvit.data import store as module
from medvit.data.store import ArrayStore, CacheFullError
from medvit.records import UsageError

ARRAY = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
SHAPE = (None, 3, 4)
NAME = "a" * 64 + ".npy"
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path):
    return ArrayStore(tmp_path / "cache")


def again(store):
    """As another process sees the same folder."""
    return ArrayStore(store.folder)


def get(store, make=ARRAY.copy):
    return store.get(NAME, np.int16, SHAPE, make)


def never():
    raise AssertionError("made again")


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def replace(path: Path, raw: bytes):
    """Other bytes in a new file of the same name."""
    other = path.with_name("other")
    other.write_bytes(raw)
    other.replace(path)


# ---- what is served -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [ARRAY, ARRAY.transpose(), np.ones((1, 5), np.float32), np.arange(32, dtype="u1")])
def test_an_array_comes_back_mapped_and_numpy_reads_its_file(array, store):
    store.put(NAME, array)
    found = again(store).find(NAME, array.dtype, array.shape)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(np.load(store.folder / NAME), array)


def test_made_once(store):
    get(store)
    np.testing.assert_array_equal(get(again(store), never), ARRAY)
    assert names(store) == [NAME]


def test_no_flipped_byte_is_served(store):
    get(store)
    raw = (store.folder / NAME).read_bytes()
    for position in range(len(raw)):
        replace(store.folder / NAME, raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        assert store.find(NAME, np.int16, SHAPE) is None, position  # though this process had checked the entry before


def test_no_entry_of_another_length_is_served(store):
    get(store)
    raw = (store.folder / NAME).read_bytes()
    for length in range(len(raw)):
        replace(store.folder / NAME, raw[:length])
        assert again(store).find(NAME, np.int16, SHAPE) is None, length
    replace(store.folder / NAME, raw + b"\0")
    assert again(store).find(NAME, np.int16, SHAPE) is None


@pytest.mark.parametrize("wrong", [ARRAY.astype(np.int32), ARRAY[0], ARRAY[:, :2], ARRAY.view(np.uint16)])
def test_another_type_or_shape_is_not_served(wrong, store):
    store.put(NAME, wrong)
    found = get(again(store))
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, ARRAY)


def test_an_entry_under_anothers_name_is_not_served(store):
    get(store)
    (store.folder / NAME).rename(store.folder / "b.npy")
    assert store.find("b.npy", np.int16, SHAPE) is None


def test_damage_is_repaired_counted_and_told_once_without_the_path(store, caplog):
    get(store)
    replace(store.folder / NAME, b"x" * 500)
    damaged = again(store)
    with caplog.at_level(logging.WARNING, "medvit.cache"):
        for _ in range(2):
            np.testing.assert_array_equal(get(damaged), ARRAY)
    assert damaged.rebuilt == 1
    assert store.rebuilt == 0
    (record,) = caplog.records
    assert record.getMessage() == f"cache entry {NAME[:12]} is damaged (its checksum does not fit); it is made again"
    np.testing.assert_array_equal(get(again(store), never), ARRAY)


def test_checksum_is_computed_once_also_for_workers_that_are_sent_the_store(store, monkeypatch):
    calls = []
    verify = module._verify
    monkeypatch.setattr(module, "_verify", lambda *arguments: calls.append(1) or verify(*arguments))
    for _ in range(3):
        get(store)
    get(pickle.loads(pickle.dumps(store)), never)
    assert len(calls) == 1


def test_a_store_pickles_without_its_arrays(store):
    large = np.zeros((100, 3, 4), np.int16)
    kept = store.get(NAME, np.int16, SHAPE, large.copy)
    assert len(pickle.dumps(store)) < 500 < kept.nbytes


def test_file_mode_follows_the_umask(store):
    before = os.umask(0o027)
    try:
        get(store)
    finally:
        os.umask(before)
    assert stat.S_IMODE((store.folder / NAME).stat().st_mode) == 0o640


# ---- several processes ----------------------------------------------------------------------------------------------


def get_all(folder: Path, barrier, log: Path):
    def make():
        with log.open("a") as stream:  # short appends are whole
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.1)  # the others arrive meanwhile
        return ARRAY

    barrier.wait()
    for number in range(4):
        found = ArrayStore(folder).get(f"{number}.npy", np.int16, SHAPE, make)
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, ARRAY)


def run_together(target, *arguments, count=3):
    barrier = SPAWN.Barrier(count)
    processes = [SPAWN.Process(target=target, args=(arguments[0], barrier, *arguments[1:])) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_that_want_the_same_at_once_make_it_once(store, tmp_path):
    assert run_together(get_all, store.folder, tmp_path / "log") == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    assert names(store) == [f"{number}.npy" for number in range(4)]


def get_all_without_locks(folder: Path, barrier, log: Path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    module.fcntl.flock = refuse
    get_all(folder, barrier, log)


def test_without_file_locks_each_process_makes_its_own_and_none_harms_another(store, tmp_path):
    assert run_together(get_all_without_locks, store.folder, tmp_path / "log") == [0, 0, 0]
    assert names(store) == [f"{number}.npy" for number in range(4)]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(stream, block):
    stream.write(block[: len(block) // 2])
    die()


def get_and_die(folder: Path, where: str):
    if where == "write":
        module._write_all = die_half_way
    elif where == "flush":
        module.os.fsync = die
    else:
        module.Path.replace = die
    get(ArrayStore(folder))


@pytest.mark.parametrize("where", ["write", "flush", "rename"])
def test_a_kill_leaves_no_half_entry_and_its_litter_goes(where, store):
    process = SPAWN.Process(target=get_and_die, args=(store.folder, where))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert names(store) == [f"{NAME}.part"]
    assert store.find(NAME, np.int16, SHAPE) is None
    store.sweep()
    assert names(store) == []
    np.testing.assert_array_equal(get(store), ARRAY)


def test_what_a_dead_process_left_does_not_stand_in_the_way(store):
    store.folder.mkdir()
    (store.folder / f"{NAME}.part").write_bytes(b"half an entry" * 100)
    np.testing.assert_array_equal(get(store), ARRAY)
    np.testing.assert_array_equal(get(again(store), never), ARRAY)
    assert names(store) == [NAME]


def test_a_file_that_is_being_written_is_not_litter(store):
    def make():
        again(store).sweep()
        assert names(store) == [f"{NAME}.part"]
        return ARRAY

    np.testing.assert_array_equal(get(store, make), ARRAY)
    assert names(store) == [NAME]


def test_who_waited_for_a_maker_that_failed_makes_it(store, monkeypatch):
    waiting, flock = threading.Event(), module.fcntl.flock

    def fail():
        monkeypatch.setattr(module.fcntl, "flock", lambda *how: waiting.set() or flock(*how))
        thread.start()
        waiting.wait(60)
        raise ZeroDivisionError

    thread = threading.Thread(target=get, args=(again(store),))
    with pytest.raises(ZeroDivisionError):
        get(store, fail)
    thread.join(60)
    assert names(store) == [NAME]
    np.testing.assert_array_equal(get(store, never), ARRAY)


# ---- writing fails --------------------------------------------------------------------------------------------------


def test_an_error_of_the_maker_passes_and_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError):
        get(store, lambda: 1 // 0)
    assert names(store) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_figures_and_leaves_no_half_file(code, store, monkeypatch):
    def full(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(CacheFullError, match=r"next entry needs \d+\.\d MB.* \d+\.\d MB free.*data\.cache_dir"):
            get(store)
    assert names(store) == []
    np.testing.assert_array_equal(get(store), ARRAY)


def get_beyond_the_limit(folder: Path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(CacheFullError, match=r"needs 13\.0 MB"):
        ArrayStore(folder).put(NAME, np.zeros((1000, 6000), np.int16))


def test_a_limit_of_the_system_leaves_no_half_file(store):
    process = SPAWN.Process(target=get_beyond_the_limit, args=(store.folder,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert names(store) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        get(ArrayStore(tmp_path / "file" / "cache"))
    assert str(tmp_path) not in str(caught.value)
