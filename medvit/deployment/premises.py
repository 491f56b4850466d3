"""The folder that a batch writes to: on a local disk, writable, with room, and used by one run at a time.

SQLite's locks and write-ahead journal do not hold on network shares ("How To Corrupt An SQLite Database File", 2.1):
there a ledger would be lost just when two machines or a dropped connection make it matter.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from medvit.records import MedvitError, UsageError

NETWORK = {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "afpfs", "ncpfs", "webdav", "davfs", "fuse.davfs2"}
NETWORK |= {
    "9p",
    "virtiofs",
    "vboxsf",
    "drvfs",
    "fuse.s3fs",
    "fuse.sshfs",
    "ceph",
    "fuse.ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "glusterfs",
    "fuse.glusterfs",
    "fuse.rclone",
}
"""File systems that several machines share."""

LOCK, LEDGER, AUDIT = ".lock", "ledger.sqlite", "audit.jsonl"
"""What is kept beside the results; the audit says what was started, decided, written and sent."""


@contextmanager
def occupied(folder: Path) -> Iterator[Path]:
    """Make and hold an output folder; the kernel lets go of it when the process ends, however it ends.

    Raises:
        UsageError: it is a network share, cannot be written, or another run holds it.
    """
    if (kind := file_system(folder)) in NETWORK:
        raise UsageError(
            f"{folder}: lies on a network share ({kind}), where the ledger of a run would not be safe. Give an "
            "--output folder on a disk of this machine, and copy the results when the run is done."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror}). Give an --output folder that this user may write to."
        ) from None
    with stream:
        _lock(stream.fileno(), folder)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield folder


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """What the system says of a failed write to the folder, as what a person can act on.

    Raises:
        MedvitError: it cannot be written any more.
    """
    try:
        yield
    except OSError as error:
        raise MedvitError(
            f"{folder}: cannot be written any more ({os.strerror(error.errno or 5)}). What was done is kept: see to "
            "the disk and run the command again."
        ) from None


def require_folder(folder: Path) -> None:
    """A share that was unmounted would otherwise set aside all that is left, study by study.

    Raises:
        MedvitError: it is gone, or empty.
    """
    try:
        there = next(folder.iterdir(), None) is not None
    except OSError:
        there = False
    if not there:
        raise MedvitError(
            f"{folder}: the folder is gone, or empty; is it still mounted? What was done is kept: run the command "
            "again when the files are back."
        )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"{folder}: another medvit-predict (process {_holder(folder)}) is writing there. Wait for it, stop it, or "
            "give another --output folder."
        ) from None


def _holder(folder: Path) -> str:
    return (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()[:20] or "unknown"


def file_system(folder: Path) -> str:
    """Kind of the file system that a folder is on, or will be: "ext4", "nfs4"; empty where nobody knows."""
    place = Path(os.path.realpath(folder))
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounts[each] for each in (place, *place.parents) if each in mounts), "")
