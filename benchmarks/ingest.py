"""How fast medvit reads CT, with all its checks, beside the readers that people use.

    python benchmarks/ingest.py [--data FOLDER] [--quick]

One series, uncompressed and as JPEG-LS: every reader in turn, in rotating order, in one warm process; the median of
each, and medvit's speed as the median of the ratios within rounds. Then an export of many small files: headers against
plain pydicom, memory per file, and a second listing with an index. Goals are those of HAZARDS G17 and of the design.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ct_export import in_both_encodings, largest_series, write_export
from ct_readers import installed
from pydicom import dcmread

import medvit.io

TAGS = """SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType
    Rows Columns ImageOrientationPatient ImagePositionPatient PixelSpacing SliceThickness SamplesPerPixel
    PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope RescaleIntercept
    RescaleType PatientID PatientName PatientBirthDate PatientSex PatientAge InstitutionName Manufacturer
    ConvolutionKernel""".split()
"""What plain pydicom is asked for: enough to sort slices, to rescale them, and to tell series and patients apart."""

CHILD = """
import sys
from pathlib import Path
from medvit.io import scan_folder
found = scan_folder(sys.argv[1])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""
"""Peak memory of listing one folder, in a process that does nothing else. Not getrusage: it inherits its parent's."""


@dataclass(frozen=True)
class Goal:
    """One figure and what it must reach."""

    what: str
    figure: float
    unit: str
    goal: float
    at_most: bool = False

    @property
    def share(self) -> float:
        """Of the goal; 1 and above is met."""
        return self.goal / max(self.figure, 1e-9) if self.at_most else self.figure / self.goal


def timed(work: Callable[[], Any]) -> float:
    """Seconds; garbage of the one before is not counted."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of each contender: all of them in each round, another first each time."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed(contenders[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def speed(seconds: Mapping[str, np.ndarray], ours: str, theirs: str) -> float:
    """How many times as fast ours is: median of the ratios within rounds."""
    return float(np.median(seconds[theirs] / seconds[ours]))


def show(title: str, seconds: Mapping[str, np.ndarray], ours: str, scale: float = 1.0, unit: str = "s") -> None:
    """A table, the fastest first."""
    print(f"\n{title}\n  {'':22}{'median ' + unit:>12}{'quartiles':>20}{'times ' + ours:>16}")
    for name, values in sorted(seconds.items(), key=lambda item: np.median(item[1])):
        low, middle, high = np.percentile(values * scale, [25, 50, 75])
        times = np.median(values / seconds[ours])
        print(f"  {name:22}{middle:12.3f}{f'{low:.3f} to {high:.3f}':>20}{times:16.2f}", flush=True)


# ---- one series -----------------------------------------------------------------------------------------------------


def race(data: Path | None, scratch: Path, rounds: int) -> tuple[list[Goal], dict[str, Any]]:
    """All readers on one series in two encodings."""
    readers, absent = installed()
    series = largest_series(data, scratch)
    sources = in_both_encodings(series, scratch)
    print(
        f"series of {series.shape[0]} slices, {series.shape[1]} x {series.shape[2]}; not installed: {absent or 'none'}"
    )
    goals: list[Goal] = []
    detail: dict[str, Any] = {"shape_zyx": series.shape, "absent": absent, "real": data is not None}
    for encoding, source in sources.items():
        contenders = {name: (lambda read=read, source=source: read(source)) for name, read in readers.items()}
        means = {name: mean_hu(name, run) for name, run in contenders.items()}  # which warms them, too
        contenders = {name: run for name, run in contenders.items() if means[name] is not None}
        seconds = alternate(contenders, rounds)
        show(f"{encoding}, {rounds} rounds", seconds, "medvit")
        detail[encoding] = {name: round(float(np.median(values)), 4) for name, values in seconds.items()}
        detail[f"{encoding}, mean HU"] = means
        wanted = {"SimpleITK": 2.3, "dcm2niix": 1.0} if encoding == "uncompressed" else {"SimpleITK": 1.8}
        for peer in (name for name in wanted if name in seconds):
            goals.append(Goal(f"{encoding}: speed over {peer}", speed(seconds, "medvit", peer), "times", wanted[peer]))
    return goals, detail


def mean_hu(name: str, run: Callable[[], Any]) -> float | None:
    """Mean of what a reader returns (an array, or the path of a NIfTI file): the same work gives the same mean.

    None where the reader refuses the series: it does not take part.
    """
    try:
        result = run()
    except Exception as error:  # noqa: BLE001  readers raise what they like
        print(f"  {name:22} refuses the series: {type(error).__name__}", flush=True)
        return None
    values = nib.load(result).get_fdata() if isinstance(result, Path) else np.asarray(result)
    mean = round(float(values.mean(dtype=np.float64)), 2)
    print(f"  {name:22} mean {mean:.2f} HU", flush=True)
    return mean


# ---- a folder of many files -----------------------------------------------------------------------------------------


def listing(scratch: Path, few: int, many: int, rounds: int) -> tuple[list[Goal], dict[str, Any]]:
    """`scan_folder` on two sizes of export: seconds per file, bytes per file, and what an index saves."""
    for name, files in (("small", few), ("large", many)):
        write_export(scratch / name, files)
    small, index = scratch / "small", scratch / "index"
    found = medvit.io.scan_folder(small)
    if [entry for entry in found.files if not entry.outcome.used]:
        raise SystemExit(f"the export is not what it should be: {found.counts()}")
    headers = {
        "medvit": lambda: medvit.io.scan_folder(small),
        "plain pydicom": lambda: read_headers(small),
    }
    alternate(headers, 1)  # warm
    seconds = alternate(headers, rounds)
    for name in ("first, with index", "again, with index") * rounds:
        if name.startswith("first"):
            index.unlink(missing_ok=True)
        took = timed(lambda: medvit.io.scan_folder(small, index=index))
        seconds[name] = np.append(seconds.get(name, []), took)
    show(f"{few} files, {rounds} rounds, microseconds per file", seconds, "medvit", 1e6 / few, "us")
    peak = {name: peak_memory(scratch / name) for name in ("small", "large")}
    print(f"\npeak memory {peak['small'] / 2**20:.1f} MiB for {few} files, {peak['large'] / 2**20:.1f} MiB for {many}")
    per_file = (peak["large"] - peak["small"]) / (many - few)
    again = speed(seconds, "again, with index", "first, with index")
    goals = [
        Goal("headers: speed over plain pydicom", speed(seconds, "medvit", "plain pydicom"), "times", 1.0),
        Goal(f"memory per file from {few} to {many}", per_file, "bytes", 1024, at_most=True),
        Goal("second listing over the first", again, "times", 10.0),
    ]
    us_per_file = {name: round(float(np.median(values)) * 1e6 / few, 1) for name, values in seconds.items()}
    return goals, {"us_per_file": us_per_file, "peak_bytes": peak}


def read_headers(folder: Path) -> None:
    """What listing costs with pydicom alone: every header, no check, nothing kept."""
    for place, _, names in os.walk(folder):
        for name in names:
            dcmread(Path(place) / name, stop_before_pixels=True, specific_tags=TAGS)


def peak_memory(folder: Path) -> int:
    """Bytes at the peak of a process that lists one folder."""
    command = [sys.executable, "-c", CHILD, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Run both parts, print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a CT series (default: pet_ct_volume, else synthetic)")
    parser.add_argument("--quick", action="store_true", help="under ten minutes: 30,000 files, 5 rounds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of the readers
    rounds, few, many = (5, 10_000, 30_000) if arguments.quick else (9, 10_000, 100_000)
    shared = os.environ.get("MEDVIT_REAL_DATA")
    data = arguments.data or (Path(shared) / "data" / "pet_ct_volume" if shared else None)
    with tempfile.TemporaryDirectory() as folder:
        one, one_detail = race(data, Path(folder), rounds)
        many_goals, many_detail = listing(Path(folder), few, many, rounds)
    goals = one + many_goals
    print()
    for goal in goals:
        relation = "at most" if goal.at_most else "at least"
        missed = "" if goal.share >= 1 else "  MISSED"
        print(f"{goal.what:45}{goal.figure:10.2f} {goal.unit}, {relation} {goal.goal:g}{missed}")
    result = {
        "name": "ingest",
        "figure": round(min(goal.share for goal in goals), 3),
        "unit": "worst share of a goal",
        "goal": 1.0,
        "met": all(goal.share >= 1 for goal in goals),
        "detail": {"goals": [asdict(goal) for goal in goals], **one_detail, **many_detail},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
