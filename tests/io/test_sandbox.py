"""The sandbox: a crash, a hang or a bomb costs one series; memory is shared, returned and never seen twice."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from ct_builder import Ct, assert_is_phantom, phantom_hu

from medvit.io import read, sandbox, scan_folder
from medvit.io.dicom import read_series
from medvit.records import ReasonCode, ScanError


@pytest.fixture
def pool(monkeypatch):
    """A sandbox of one worker with a deadline of five seconds, used by every reader of this process."""
    own = sandbox.Sandbox(1, deadline_s=5.0)
    monkeypatch.setattr(sandbox, "_default", (os.getpid(), own))
    yield own
    own.close()


def strike(pool, signal_number, times):
    """Hit the worker, and each that takes its place, as soon as it is there."""

    def wait_and_hit():
        hit = set()
        while len(hit) < times:
            for pid in set(pool.pids) - hit:
                os.kill(pid, signal_number)
                hit.add(pid)
            time.sleep(0.0005)

    thread = threading.Thread(target=wait_and_hit)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("signal_number", "code"),
    [
        (signal.SIGSEGV, ReasonCode.WORKER_DIED),
        (signal.SIGKILL, ReasonCode.WORKER_DIED),
        (signal.SIGSTOP, ReasonCode.DEADLINE),
    ],
)
def test_a_crash_or_a_hang_costs_one_series_and_the_next_is_read(tmp_path, pool, signal_number, code):
    Ct().write(tmp_path)
    thread = strike(pool, signal_number, times=1 if code is ReasonCode.DEADLINE else 2)
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    thread.join()
    assert caught.value.code is code
    assert len(caught.value.files) >= 1
    assert_is_phantom(read(tmp_path))


def test_a_worker_that_died_while_idle_is_replaced_without_a_word(tmp_path, pool):
    Ct().write(tmp_path)
    read(tmp_path)
    os.kill(pool.pids[0], signal.SIGKILL)
    time.sleep(0.1)
    assert_is_phantom(read(tmp_path))


def test_workers_are_reused(tmp_path, pool):
    Ct().write(tmp_path)
    read(tmp_path)
    before = pool.pids
    read(tmp_path)
    assert pool.pids == before


def test_a_worker_that_needs_more_than_its_memory_is_refused_it(tmp_path, monkeypatch):
    """A JPEG 2000 slice is decoded into 200 MB; the worker may have less beside the volume."""
    hu = np.zeros((1, 4096, 4096), int)
    hu[0, :100] = -1000
    Ct(hu=hu, transfer_syntax="1.2.840.10008.1.2.4.90").write(tmp_path)
    small = sandbox.Sandbox(1, memory_bytes=160 << 20)
    monkeypatch.setattr(sandbox, "_default", (os.getpid(), small))
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    small.close()
    assert caught.value.code in (ReasonCode.RESOURCE_LIMIT, ReasonCode.WORKER_DIED, ReasonCode.PIXEL_TRUNCATED)
    monkeypatch.setattr(sandbox, "_default", None)
    np.testing.assert_array_equal(read(tmp_path).hu, hu)


def test_a_panic_that_is_no_exception_is_a_coded_error(tmp_path):
    """pylibjpeg-rle raises pyo3's PanicException, a BaseException, on this kind of file; whatever comes is coded."""
    (path,) = Ct(transfer_syntax="1.2.840.10008.1.2.5").write(tmp_path, only=[0])
    raw = path.read_bytes()
    at = raw.rindex(b"\xfe\xff\x00\xe0")
    for number, cut in enumerate((9, 20, 40, 64, 72, 80)):
        path.write_bytes(raw[: at + cut] + b"\xff" * (len(raw) - at - cut))
        with pytest.raises(ScanError):
            read_series([path])
        assert number >= 0


def test_two_volumes_held_at_once_do_not_share_memory(tmp_path):
    Ct().write(tmp_path / "a")
    Ct(hu=phantom_hu() + 7).write(tmp_path / "b")
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    np.testing.assert_array_equal(first.hu + 7, second.hu)


def test_a_view_keeps_its_memory_when_the_scan_is_gone(tmp_path):
    Ct().write(tmp_path / "a")
    Ct(hu=phantom_hu() + 7).write(tmp_path / "b")
    view = read(tmp_path / "a").hu[3:5, ::2]
    kept = view.copy()
    gc.collect()
    for _ in range(4):
        read(tmp_path / "b")
    np.testing.assert_array_equal(view, kept)


def test_memory_of_a_volume_that_is_gone_is_used_again(tmp_path, pool):
    Ct().write(tmp_path)
    address = read(tmp_path).hu.__array_interface__["data"][0]
    gc.collect()
    assert read(tmp_path).hu.__array_interface__["data"][0] == address


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_see_the_next_volume_in_its_copy(tmp_path, pool):
    """The parent drops its scan and reads another; the child's must stay what it was."""
    Ct().write(tmp_path / "a")
    Ct(hu=phantom_hu() + 7).write(tmp_path / "b")
    program = f"""
import os, sys
from medvit.io import read
scan = read({str(tmp_path / "a")!r})
total = float(scan.hu.sum())
go, ready = os.pipe()
child = os.fork()
if child == 0:
    os.read(go, 1)
    os._exit(0 if float(scan.hu.sum()) == total else 1)
del scan
other = [read({str(tmp_path / "b")!r}) for _ in range(3)]
os.write(ready, b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False).returncode == 0


def test_threads_read_at_the_same_time(tmp_path):
    for number in range(4):
        Ct(hu=phantom_hu() + number).write(tmp_path / str(number))
    results = {}

    def work(number):
        results[number] = read(tmp_path / str(number)).hu

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_array_equal(results[number], phantom_hu() + number)


def test_workers_import_neither_torch_nor_monai_and_end_with_their_parent(tmp_path):
    Ct().write(tmp_path)
    program = f"""
from medvit.io import read, sandbox
read({str(tmp_path)!r})
for pid in sandbox.shared().pids:
    maps = open(f"/proc/{{pid}}/maps").read()
    print(pid, "torch" in maps, "pandas" in maps)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    workers = [line.split() for line in done.stdout.splitlines()]
    assert workers
    assert all(line[1:] == ["False", "False"] for line in workers)
    time.sleep(0.3)
    assert not any(os.path.exists(f"/proc/{pid}") for pid, *_ in workers)  # noqa: PTH110


def test_a_refused_slice_is_named_and_the_first_of_several(tmp_path):
    paths = Ct(transfer_syntax="1.2.840.10008.1.2.4.80").write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    for index in (9, 4):
        raw = paths[index].read_bytes()
        paths[index].write_bytes(raw[: len(raw) - 60] + bytes(60))
    with pytest.raises(ScanError) as caught:
        read_series(paths)
    assert caught.value.code is ReasonCode.PIXEL_TRUNCATED
    assert caught.value.files == (str(paths[4]),)
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code is ReasonCode.INCOMPLETE


def test_a_worker_that_is_killed_once_costs_nothing(tmp_path, pool):
    """The system takes memory back from whom it likes; a file that kills its decoder does so again."""
    Ct().write(tmp_path)
    read(tmp_path)
    thread = strike(pool, signal.SIGKILL, times=1)
    assert_is_phantom(read(tmp_path))
    thread.join()


def test_an_interrupted_read_leaves_no_answer_for_the_next(tmp_path, pool):
    """Ctrl-C in a notebook: the answer that was under way must not pass for one of the next series."""
    noise = np.random.default_rng(0).integers(-1000, 1500, (96, 256, 256))
    Ct(hu=noise, transfer_syntax="1.2.840.10008.1.2.4.80").write(tmp_path / "a")
    Ct(hu=noise[::-1] + 7, uid=2, transfer_syntax="1.2.840.10008.1.2.4.80").write(tmp_path / "b")
    one, two = (scan_folder(tmp_path / name).series[0] for name in "ab")
    pool.deadline_s = 60

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    for attempt in range(6):
        signal.setitimer(signal.ITIMER_REAL, 0.03 + 0.03 * attempt)
        try:
            read(one)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        np.testing.assert_array_equal(read(two).hu, noise[::-1] + 7)
    signal.signal(signal.SIGALRM, before)
    assert interrupted


def test_many_volumes_alive_do_not_use_up_the_descriptors(tmp_path, monkeypatch, pool):
    monkeypatch.setattr(sandbox, "MOST_LENT", 3)
    for number in range(6):
        Ct(hu=phantom_hu() + number).write(tmp_path / str(number))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    scans = [read(tmp_path / str(number)) for number in range(6)]
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 3 + 2 + 2  # noqa: PTH208
    for number, scan in enumerate(scans):
        np.testing.assert_array_equal(scan.hu, phantom_hu() + number)


def test_a_module_beside_the_script_is_not_taken_for_a_standard_one(tmp_path):
    Ct().write(tmp_path / "ct")
    (tmp_path / "resource.py").write_text("raise SystemExit(3)")
    script = tmp_path / "run.py"
    script.write_text(f"from medvit.io import read\nprint(read({str(tmp_path / 'ct')!r}).hu.shape)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(12, 20, 24)"
