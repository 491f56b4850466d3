"""Files made to exhaust a reader: seconds until each is refused, and the memory it took.

Each bomb gets a folder and a process of its own: `scan_folder`, then `read` of whatever was listed as usable, with
warm decoding workers. Peaks are of resident memory (VmHWM), which counts the shared volume too; the workers' are
sampled, because a worker that misbehaves is gone when one looks. Linux only.

    python benchmarks/bombs.py
"""

import argparse
import gzip
import json
import multiprocessing
import os
import re
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medvit.io import phantom, read, sandbox, scan_folder
from medvit.records import ScanError

GOAL_S = 5.0
GIB = 1 << 30
ELEMENT_BEFORE = b"\x10\0\x10\0"
"""Where further elements are put in: before the patient's name."""


# ---- bombs ----------------------------------------------------------------------------------------------------------


def good_slice(folder: Path) -> Path:
    """One slice that is read as it is."""
    patient = phantom.make_patients(1, 1)[0]
    hu, affine = phantom.render(patient, matrix=128, slices=1)
    (path,) = phantom.write_series(folder, hu, affine, patient)
    dataset = dcmread(path)
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset.decompress()
        dataset.save_as(path)
    return path


def rewritten(edit: Callable[[Dataset], None], syntax: str = ExplicitVRLittleEndian) -> Callable[[Path], None]:
    """The good slice, compressed and edited."""

    def write(path: Path) -> None:
        dataset = dcmread(path)
        if syntax != ExplicitVRLittleEndian:
            dataset.compress(syntax, generate_instance_uid=False)
        edit(dataset)
        dataset.save_as(path)

    return write


def matrix(side: int) -> Callable[[Dataset], None]:
    """A header that claims `side` squared pixels."""

    def edit(dataset: Dataset) -> None:
        dataset.Rows = dataset.Columns = side

    return edit


def run_lengths(side: int) -> Callable[[Dataset], None]:
    """RLE of a whole `side` squared image: 128 pixels for every two bytes, so that header and pixels agree."""

    def edit(dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = RLELossless
        dataset.Rows = dataset.Columns = side
        run = b"\x81\0" * (side * side // 128)
        dataset.PixelData = encapsulate([struct.pack("<16I", 2, 64, 64 + len(run), *[0] * 13) + run + run])
        dataset["PixelData"].is_undefined_length = True

    return edit


def lying_codestream(at: int, form: str, *size: int) -> Callable[[Dataset], None]:
    """A compressed frame whose own header claims another size than the data set."""

    def edit(dataset: Dataset) -> None:
        (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
        code = bytearray(frame)
        struct.pack_into(form, code, at if at >= 0 else code.index(b"\xff\xf7") + 5, *size)
        dataset.PixelData = encapsulate([bytes(code)])
        dataset["PixelData"].is_undefined_length = True

    return edit


def inserted(value: bytes) -> Callable[[Path], None]:
    """Bytes put into the header of the good slice."""

    def write(path: Path) -> None:
        raw = path.read_bytes()
        at = raw.index(ELEMENT_BEFORE)
        path.write_bytes(raw[:at] + value + raw[at:])

    return write


def deflated(path: Path) -> None:
    """Two GiB of zeros in a private element, 2 MB on disk."""
    rewritten(lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))(path)
    raw = path.read_bytes()
    start = 144 + int.from_bytes(raw[140:144], "little")
    head = zlib.decompress(raw[start:], -15)
    head = head[: head.index(ELEMENT_BEFORE)] + b"\x09\0\x10\x10OB\0\0" + struct.pack("<I", 2 * GIB - 2)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    megabyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(raw[:start] + packed + megabyte * 2048)


def nested(depth: int) -> bytes:
    """A private sequence in a sequence in a sequence..."""
    inward = (b"\x09\0\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff") * depth
    return inward + (b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0") * depth


def volume(shape: tuple[int, int, int], inflated: int) -> Callable[[Path], None]:
    """A NIfTI file that claims `shape` and inflates to so many bytes."""

    def write(path: Path) -> None:
        path.unlink()
        head = bytearray(352)
        struct.pack_into("<i", head, 0, 348)
        struct.pack_into("<8h", head, 40, 3, *shape, 1, 1, 1, 1)
        struct.pack_into("<2h", head, 70, 4, 16)
        struct.pack_into("<8f", head, 76, 1, 1, 1, 1, 0, 0, 0, 0)
        struct.pack_into("<f", head, 108, 352)
        struct.pack_into("<h", head, 254, 1)
        struct.pack_into("<12f", head, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
        head[344:348] = b"n+1\0"
        with gzip.open(path.with_name("bomb.nii.gz"), "wb", compresslevel=1) as stream:
            stream.write(head)
            for _ in range(inflated >> 20):
                stream.write(bytes(1 << 20))

    return write


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else under the good slice's name."""

    def write(path: Path) -> None:
        path.unlink()
        make(path)

    return write


BOMBS: dict[str, Callable[[Path], None]] = {
    "deflate, 2 GiB in 2 MB": deflated,
    "matrix 65535 x 65535": rewritten(matrix(65535)),
    "RLE header 20000 x 20000": rewritten(matrix(20000), RLELossless),
    "RLE 16384 x 16384, honest": rewritten(run_lengths(16384)),
    "RLE 8192 x 8192, honest": rewritten(run_lengths(8192)),
    "JPEG 2000 claims 20000 x 20000": rewritten(lying_codestream(8, ">II", 20000, 20000), JPEG2000Lossless),
    "JPEG 2000 claims 2^31 - 1": rewritten(lying_codestream(8, ">II", 2**31 - 1, 2**31 - 1), JPEG2000Lossless),
    "JPEG-LS claims 65535 x 65535": rewritten(lying_codestream(-1, ">HH", 65535, 65535), JPEGLSLossless),
    "element of 4 GiB": inserted(b"\x09\0\x10\x10OB\0\0" + struct.pack("<I", 0xFFFFFFF0)),
    "1,000,000 nested sequences": inserted(nested(1_000_000)),
    "NIfTI 32767^3 voxels": volume((32767, 32767, 32767), 1 << 20),
    "NIfTI, 4 GiB behind a small header": volume((64, 64, 8), 4 * GIB),
    "zip": replaced(lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000))),
    "pipe": replaced(os.mkfifo),
    "link to its own folder": replaced(lambda path: path.symlink_to(path.parent, target_is_directory=True)),
    "/dev/zero by a link": replaced(lambda path: path.symlink_to("/dev/zero")),
}


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Peak resident memory of the decoding workers, looked at every 5 ms."""

    peak: int = 0
    over: bool = False

    def run(self) -> None:
        """Until `over`."""
        while not self.over:
            self.peak = max([self.peak, *(resident_peak(pid) for pid in sandbox.shared().pids)])
            time.sleep(0.005)


def resident_peak(pid: int | str = "self") -> int:
    """VmHWM, bytes; 0 for a process that is gone."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def measure(folder: Path, warm_up: Path) -> tuple[float, str, int, int]:
    """Seconds, outcome, bytes that this process grew by, and peak bytes of a worker."""
    for series in scan_folder(warm_up).series:
        read(series)
    before, watch = resident_peak(), Watch()
    watcher = threading.Thread(target=watch.run)
    watcher.start()
    start, codes = time.perf_counter(), []
    inventory = scan_folder(folder)
    for series in inventory.series:
        try:
            codes.append("read" if series.usable and read(series) else str(series.codes[0]))
        except ScanError as error:
            codes.append(str(error.code))
    seconds = time.perf_counter() - start
    watch.over = True
    watcher.join()
    owned = {name for series in inventory.series for name in series.files}
    codes += [str(entry.code) for entry in inventory.files if entry.path not in owned]
    return seconds, " ".join(dict.fromkeys(codes)), resident_peak() - before, watch.peak


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.parse_args()
    rows = {}
    print(f"{'bomb':38} {'seconds':>8} {'reader +MB':>10} {'worker MB':>10}  outcome")
    with tempfile.TemporaryDirectory() as scratch:
        warm_up = Path(scratch) / "warm-up"
        good_slice(warm_up)
        for number, (name, make) in enumerate(BOMBS.items()):
            folder = Path(scratch) / str(number)
            make(good_slice(folder))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[name] = seconds, outcome, grown, worker = pool.apply(measure, (folder, warm_up))
            print(f"{name:38} {seconds:8.3f} {grown / 1e6:10.0f} {worker / 1e6:10.0f}  {outcome}", flush=True)
    slowest = max(seconds for seconds, *_ in rows.values())
    met = slowest < GOAL_S and all(worker <= sandbox.MEMORY_BYTES for *_, worker in rows.values())
    names = ("seconds", "outcome", "reader_bytes", "worker_bytes")
    detail = {name: dict(zip(names, row, strict=True)) for name, row in rows.items()}
    result = {"name": "bombs", "figure": round(slowest, 3), "unit": "s", "goal": GOAL_S, "met": met, "detail": detail}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
