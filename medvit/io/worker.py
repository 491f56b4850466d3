"""What runs in a decoding worker: it gets tasks and gives answers as JSON over a socket, until its parent is gone.

Nothing is unpickled on either side: a worker that has run a hostile file may say anything. Kept small, because it is
started for every program that reads a scan: numpy, and a codec when one is needed.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvit.io import nifti, pixels
from medvit.io.plausible import Tally
from medvit.records import ReasonCode, ScanError

Task = dict[str, Any]

_LARGEST_MESSAGE = 1 << 26


def serve(descriptor: int, memory_bytes: int) -> None:
    """Answer tasks until the parent is gone."""
    import resource  # noqa: PLC0415  does not exist on Windows, where no worker runs

    for stop in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and the end of a service are the parent's affair
        signal.signal(stop, signal.SIG_IGN)
    _offer_to_die_first()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold pixels
    channel = socket.socket(fileno=descriptor)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    while True:
        try:
            task, handed = receive(channel)
        except (EOFError, OSError):
            return
        if handed:
            memory = mmap.mmap(handed[0], task["map"])
            os.close(handed[0])
        # the volume is not the worker's own memory
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes + len(memory), resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, task["seconds"] + 1)  # ends even C code whose parent was killed
        reply = _attempt(task, memory)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(channel, reply)


def _offer_to_die_first() -> None:
    """Where the machine runs out of memory, the kernel ends a worker, which costs a series, and not its parent."""
    with suppress(OSError):  # not Linux, or not allowed in this container
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _attempt(task: Task, memory: mmap.mmap) -> dict[str, Any]:
    try:
        return {"answer": TASKS[task["do"]](task, memory)}
    except ScanError as error:
        return {"code": error.code, "detail": error.detail, "files": error.files}
    except MemoryError:
        return {"code": ReasonCode.RESOURCE_LIMIT, "detail": "reading needs too much memory", "files": ()}
    except BaseException as error:  # noqa: BLE001  any type at all: the parent must hear of it
        return {"code": ReasonCode.WORKER_DIED, "detail": f"the decoder failed ({type(error).__name__})", "files": ()}


def _planes(task: Task, memory: mmap.mmap) -> list[Tally]:
    layouts = [pixels.Layout(*layout) for layout in task["layouts"]]
    frames = [pixels.Frame(*frame)._replace(stamp=tuple(frame[3])) for frame in task["frames"]]
    return pixels.fill_planes(_volume(task, memory), layouts, frames)


def _volume(task: Task, memory: mmap.mmap) -> npt.NDArray[np.float32]:
    shape = task["shape"]
    return np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape)


def _volume_file(task: Task, memory: mmap.mmap) -> list[ReasonCode]:
    return list(nifti.fill(Path(task["path"]), _volume(task, memory)))


TASKS: dict[str, Callable[[Task, mmap.mmap], Any]] = {"planes": _planes, "volume": _volume_file}


def send(channel: socket.socket, message: dict[str, Any], descriptor: int | None = None) -> None:
    """One message, and with it the descriptor of memory to map."""
    data = json.dumps(message).encode()
    head = len(data).to_bytes(4, "little")
    if descriptor is None:
        channel.sendall(head)
    else:
        socket.send_fds(channel, [head], [descriptor])
    channel.sendall(data)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message, and the descriptors that came with it.

    Raises:
        EOFError: the other side is gone.
        ValueError: what came is no message.
    """
    head, descriptors, _, _ = socket.recv_fds(channel, 4, 1)
    if len(head) < 4:
        raise EOFError
    length = int.from_bytes(head, "little")
    if length > _LARGEST_MESSAGE:
        raise ValueError("message too long")
    data = bytearray()
    while len(data) < length:
        part = channel.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return json.loads(data), list(descriptors)
