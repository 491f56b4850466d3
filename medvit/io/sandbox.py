"""Decoding in killable, reused worker processes, with a memory cap and a deadline.

Codecs are C, C++ and Rust fed with files from anywhere: they crash, hang, panic and allocate (HAZARDS of every
toolkit). A worker that does costs one series, never the run. Workers are plain Python processes that import numpy and
one codec, nothing of torch or MONAI, start in a tenth of a second and are used again; they get tasks and give answers
as JSON over a socket (nothing is unpickled from a process that has run a hostile file), and write pixels straight into
memory that the parent shares, so that a volume is never copied.

Memory of a volume goes back to the pool when the last array on it is gone, and is used for the next: pages that are
already there are what makes reading fast.
"""

from __future__ import annotations

import atexit
import math
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvit.io import nifti, pixels
from medvit.io.plausible import Tally
from medvit.io.worker import Task, receive, send
from medvit.records import ReasonCode, ScanError

MEMORY_BYTES = 3 << 29
"""1.5 GiB of address space for a worker beside the volume that it fills."""

DEADLINE_S = 60.0
"""For one task: a dozen slices, or one volume file."""

MOST_WORKERS = 8
MOST_LENT = 64
"""Volumes alive that keep their shared memory, and with it two descriptors each; of more, a copy is handed out."""

KEPT_FREE = 2
"""Memories of past volumes that wait to be used again."""

_CHUNKS_PER_WORKER = 8
_LARGEST_CHUNK = 16


class _Memory:
    """Anonymous memory that workers can map: it has no name, so that nothing is left behind by a killed run."""

    def __init__(self, size: int) -> None:
        self.size, self.generation, self.descriptor = size, _generation, _anonymous_file()
        os.ftruncate(self.descriptor, size)
        self.map = mmap.mmap(self.descriptor, size)

    def __del__(self) -> None:
        os.close(self.descriptor)


def _anonymous_file() -> int:
    try:
        return os.memfd_create("medvit-volume")  # not /dev/shm, which containers keep at 64 MB
    except (AttributeError, OSError):  # not Linux, or not allowed in this container
        with tempfile.TemporaryFile() as stream:
            return os.dup(stream.fileno())


_generation = 0


def _forked() -> None:
    """Volumes that a forked child may still see are not written to again."""
    global _generation  # noqa: PLW0603  the fork hook has no other place
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_forked)


class _Worker:
    """One process and the socket to it."""

    def __init__(self, memory_bytes: int) -> None:
        self.channel, theirs = socket.socketpair()
        try:
            with theirs:
                serve = f"from medvit.io.worker import serve; serve({theirs.fileno()}, {memory_bytes})"
                self.process = start_process(serve, theirs.fileno())
        except BaseException:  # Ctrl-C, or no process left: its end of the socket tells a started one to go
            self.channel.close()
            raise
        self.mapped: _Memory | None = None
        self.task: Task | None = None
        self.until = 0.0

    def give(self, task: Task, memory: _Memory, seconds: float) -> None:
        self.task, self.until = task, time.monotonic() + seconds
        fresh = memory if memory is not self.mapped else None
        self.mapped = memory
        send(self.channel, {**task, "seconds": seconds, "map": memory.size}, fresh.descriptor if fresh else None)

    def take(self) -> Any:
        answer = receive(self.channel)[0]
        self.task = None  # only now is the worker free
        return answer

    def end(self) -> None:
        self.process.kill()
        self.channel.close()
        self.process.wait()


def start_process(program: str, descriptor: int) -> subprocess.Popen[bytes]:
    """A quiet Python process that runs a line of code and has this descriptor."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # our own package first, what the caller imports from last: a script's neighbours shadow no standard module
    home, others = str(Path(__file__).parents[2]), [entry for entry in sys.path if entry]
    paths = f"import sys; sys.path[:0] = [{home!r}]; sys.path += {others!r}\n"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", paths + program],  # -P: nothing in the working folder is a module
        env={**os.environ, **threads},
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # codecs print; what matters comes back as an answer
        stderr=subprocess.DEVNULL,  # and libraries tell values of patients
    )


class Sandbox:
    """A pool of decoding workers; they start when first needed.

    Args:
        workers: processes; None: one per core, up to `MOST_WORKERS`.
        memory_bytes: address space of a worker beside the volume.
        deadline_s: for one task, seconds.
    """

    def __init__(
        self, workers: int | None = None, *, memory_bytes: int = MEMORY_BYTES, deadline_s: float = DEADLINE_S
    ) -> None:
        self.size = workers or min(MOST_WORKERS, _cores())
        self.memory_bytes, self.deadline_s = memory_bytes, deadline_s
        self._workers: list[_Worker] = []
        self._free: deque[_Memory] = deque(maxlen=KEPT_FREE)
        self._lent = 0
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in self._workers]

    def decode(
        self, shape: tuple[int, int, int], layouts: Sequence[pixels.Layout], frames: Sequence[pixels.Frame]
    ) -> tuple[npt.NDArray[np.float32], list[Tally]]:
        """Decode slices into a volume.

        Args:
            shape: (Z, Y, X).
            layouts: how their pixels lie.
            frames: where they are, one for each plane.

        Returns:
            HU (Z, Y, X), and the tally of each frame.

        Raises:
            ScanError: of the first slice that cannot be decoded, `WORKER_DIED` or `DEADLINE`.
        """
        length = min(_LARGEST_CHUNK, math.ceil(len(frames) / (self.size * _CHUNKS_PER_WORKER)))
        tasks: list[Task] = [
            {"do": "planes", "shape": shape, "layouts": layouts, "frames": frames[start : start + length]}
            for start in range(0, len(frames), length)
        ]
        volume, answers = self.fill(shape, tasks, [tuple(frame.path for frame in task["frames"]) for task in tasks])
        return volume, [Tally(*tally) for answer in answers for tally in answer]

    def fill(
        self, shape: tuple[int, int, int], tasks: Sequence[Task], files: Sequence[tuple[str, ...]]
    ) -> tuple[npt.NDArray[np.float32], list[Any]]:
        """Run tasks that fill one volume between them."""
        with self._lock:
            try:
                memory = self._memory(4 * math.prod(shape))
                answers = self._run(tasks, files, memory)
            except OSError as error:  # no memory, no descriptor, no process left
                detail = f"decoding needs more of this machine ({os.strerror(error.errno or 12)})"
                raise ScanError(ReasonCode.RESOURCE_LIMIT, detail, files[0]) from None
        flat = np.frombuffer(memory.map, np.float32, math.prod(shape))
        if self._lent >= MOST_LENT:
            volume = flat.reshape(shape).copy()
            self._free.append(memory)
            return volume, answers
        self._lent += 1
        # views hold on to `flat`, and so does torch: when it is gone, nobody sees this memory
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(shape), answers

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _memory(self, size: int) -> _Memory:
        """Memory of at least this size: some that is free and not twice as large, else new."""
        for candidate in list(self._free):
            if size <= candidate.size <= 2 * size:
                with suppress(ValueError):  # taken or pushed out by another thread's volume meanwhile
                    self._free.remove(candidate)
                    return candidate
        return _Memory(max(size, mmap.PAGESIZE))

    def _give_back(self, memory: _Memory) -> None:
        self._lent -= 1
        if memory.generation == _generation:
            self._free.append(memory)

    def _run(self, tasks: Sequence[Task], files: Sequence[tuple[str, ...]], memory: _Memory) -> list[Any]:
        """Answers in the order of the tasks; of several faults the first in that order is raised."""
        try:
            return self._run_all(tasks, files, memory)
        except BaseException:  # Ctrl-C: an answer that is under way must not pass for one of the next series
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._drop(worker)
            raise

    def _run_all(self, tasks: Sequence[Task], files: Sequence[tuple[str, ...]], memory: _Memory) -> list[Any]:
        waiting, answers, faults = deque(range(len(tasks))), [None] * len(tasks), dict[int, ScanError]()
        busy: dict[_Worker, int] = {}
        again = Counter[int]()
        while (waiting and not faults) or busy:
            while waiting and not faults and (worker := self._idle(busy)) is not None:
                number = waiting.popleft()
                busy[worker] = number
                with suppress(OSError):  # died while idle: its end is found below
                    worker.give(tasks[number], memory, self.deadline_s)
            for worker in self._ready(busy):
                number = busy.pop(worker)
                try:
                    answers[number] = self._answer(worker, files[number])
                except ScanError as fault:
                    if fault.code is ReasonCode.WORKER_DIED and again[number] < self.size:
                        again[number] += 1  # perhaps all were killed while idle, for their memory: another try
                        waiting.appendleft(number)
                    else:
                        faults[number] = fault
        if faults:
            raise faults[min(faults)]
        return answers

    def _idle(self, busy: dict[_Worker, int]) -> _Worker | None:
        for worker in list(self._workers):
            if worker not in busy:
                if worker.process.poll() is None:
                    return worker
                self._drop(worker)
        if len(self._workers) < self.size:
            self._workers.append(_Worker(self.memory_bytes))
            return self._workers[-1]
        return None

    def _ready(self, busy: Iterable[_Worker]) -> list[_Worker]:
        """Workers that have answered, died, or run out of time."""
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            left = min(worker.until for worker in busy) - time.monotonic()
            ready = [key.data for key, _ in selector.select(max(0.0, left))]
        return ready or [worker for worker in busy if worker.until <= time.monotonic()]

    def _answer(self, worker: _Worker, files: tuple[str, ...]) -> Any:
        late = worker.until <= time.monotonic()
        try:
            if late:
                raise TimeoutError
            answer = worker.take()
            fault = _fault(answer, files)
        except (OSError, ValueError, EOFError):
            self._drop(worker)
            status = worker.process.returncode
            if late or status == -signal.SIGALRM:
                detail = f"not decoded within {self.deadline_s:g} seconds"
                raise ScanError(ReasonCode.DEADLINE, detail, files) from None
            raise ScanError(ReasonCode.WORKER_DIED, f"the decoder ended with status {status}", files) from None
        if fault is not None:
            raise fault
        return answer["answer"]

    def _drop(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)


def _fault(answer: Any, files: tuple[str, ...]) -> ScanError | None:
    """What a worker could not do; ValueError where it says what no sound worker says."""
    if "code" not in answer:
        return None
    return ScanError(ReasonCode(answer["code"]), answer["detail"], tuple(answer["files"]) or files)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_default: tuple[int, Sandbox] | None = None


def shared() -> Sandbox:
    """The sandbox of this process: all readers use it. A forked child gets its own."""
    global _default  # noqa: PLW0603  one pool for the process is the point
    if _default is None or _default[0] != os.getpid():
        _default = os.getpid(), Sandbox()
        atexit.register(_default[1].close)
        if "multiprocessing.util" in sys.modules:  # loader processes end without atexit
            sys.modules["multiprocessing.util"].Finalize(None, _default[1].close, exitpriority=10)
    return _default[1]


def decode(
    shape: tuple[int, int, int], layouts: Sequence[pixels.Layout], frames: Sequence[pixels.Frame]
) -> tuple[npt.NDArray[np.float32], list[Tally]]:
    """`Sandbox.decode` in the shared sandbox; in this process where the system cannot pass memory (Windows)."""
    if hasattr(socket, "send_fds"):
        return shared().decode(shape, layouts, frames)
    volume = np.empty(shape, np.float32)
    return volume, pixels.fill_planes(volume, layouts, frames)


def fill_volume(path: Path, shape: tuple[int, int, int]) -> tuple[npt.NDArray[np.float32], tuple[ReasonCode, ...]]:
    """HU (Z, Y, X) of a volume file whose header was examined, and its flags; decoded in the shared sandbox."""
    if hasattr(socket, "send_fds"):
        task = {"do": "volume", "shape": shape, "path": str(path)}
        volume, (codes,) = shared().fill(shape, [task], [(str(path),)])
        return volume, tuple(ReasonCode(code) for code in codes)
    volume = np.empty(shape, np.float32)
    return volume, nifti.fill(path, volume)
