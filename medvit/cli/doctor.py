"""medvit-doctor: what will work on this machine and what will not.

Checks codecs, CPU and devices, OpenCV, configs, disk, memory, the site's key, and how large the caches are (they hold
pixels: PHI). With --audit it checks instead that the audit of a folder of results is as it was written.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

from medvit import __version__, data
from medvit.cli.console import Parser, command, tables
from medvit.config import shipped_configs
from medvit.deployment import audit_check
from medvit.deployment.audit_line import Head
from medvit.io import sandbox, selftest
from medvit.io.faults import can_decode
from medvit.records import EXIT_DONE, EXIT_REFUSED, MedvitError, UsageError

TRANSFER_SYNTAXES = {
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended, 12 bit",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless SV1",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.201": "HTJ2K lossless",
}
PACKAGES = ("torch", "torchvision", "monai", "timm", "lightning-fabric", "pydicom", "nibabel", "SimpleITK")


class Finding(NamedTuple):
    """One line: does it work, and what follows."""

    what: str
    works: bool
    detail: str


def parser() -> Parser:
    """The arguments."""
    result = Parser("doctor", __doc__ or "")
    result.add_argument("--json", action="store_true", help="one JSON document on stdout")
    result.add_argument("--audit", type=Path, metavar="FILE", help="check OUT/audit.jsonl; ends with 4 if it is broken")
    result.add_argument(
        "--audit-end", metavar="N:HASH", help="an end of it that was kept elsewhere: are all entries up to it there?"
    )
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.audit:
        return check_audit(arguments.audit, arguments.audit_end, as_json=arguments.json)
    findings = [finding for check in CHECKS for finding in check()]
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
        return EXIT_DONE
    console = tables()
    for what, works, detail in findings:
        console.print(f"{'ok ' if works else 'NO '} {what:28} {detail}", highlight=False, markup=False)
    return EXIT_DONE


def check_audit(path: Path, end: str | None, *, as_json: bool) -> int:
    """Verify an audit and say so.

    Raises:
        UsageError: no such file, no key to check it with, or the end is not N:HASH.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file. Give the audit.jsonl of a folder of results.")
    if not os.environ.get("MEDVIT_SITE_KEY") and not data.site_key_path().is_file():
        raise UsageError("this machine has no site key, without which nobody can check an audit: run it where it is.")
    verdict = audit_check.verify(path, data.site_key(), _parse_end(end) if end else None)
    if as_json:
        problems = [problem._asdict() for problem in verdict.problems]
        print(json.dumps({"intact": verdict.intact, **verdict.head._asdict(), "problems": problems}, indent=1))
    else:
        print("\n".join(audit_check.told(verdict)))
    return EXIT_DONE if verdict.intact else EXIT_REFUSED


def _parse_end(text: str) -> Head:
    entries, _, hashed = text.partition(":")
    if not entries.isdecimal() or not re.fullmatch("[0-9a-f]{64}", hashed):
        raise UsageError("--audit-end takes N:HASH, as an earlier check printed it.")
    return Head(int(entries), hashed)


def check_versions() -> list[Finding]:
    """Python and the packages that matter."""
    parts = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [Finding("versions", True, f"medvit {__version__}, Python {platform.python_version()}, {parts}")]


def check_opencv() -> list[Finding]:
    """OpenCV loads only where the libraries of its build are."""
    try:
        return [Finding("OpenCV (CLAHE, resizing)", True, str(importlib.import_module("cv2").__version__))]
    except ImportError as error:
        remedy = "pip uninstall opencv-python; pip install opencv-python-headless"
        return [Finding("OpenCV (CLAHE, resizing)", False, f"{error}. On a server without libGL: {remedy}")]


def check_codecs() -> list[Finding]:
    """Compressed transfer syntaxes."""
    return [
        Finding(f"decode {name}", can_decode(uid), uid if can_decode(uid) else f"{uid}: series become TS_UNSUPPORTED")
        for uid, name in TRANSFER_SYNTAXES.items()
    ]


def check_reading() -> list[Finding]:
    """A synthetic CT goes through the reader and its workers, and through SimpleITK."""
    try:
        selftest.check_orientation()
    except MedvitError as error:
        return [Finding("reading self-test", False, str(error))]
    pool = sandbox.shared()
    limits = f"up to {pool.size} processes, {pool.memory_bytes / 2**30:.1f} GiB and {pool.deadline_s:.0f} s a task"
    return [
        Finding("reading self-test", True, "a phantom is where it was written, and SimpleITK agrees"),
        Finding("decoding in workers", bool(pool.pids), limits if pool.pids else "none: a codec's crash ends the run"),
    ]


def check_devices() -> list[Finding]:
    """Where training and prediction can run."""
    torch = importlib.import_module("torch")  # seconds: only this command pays for it here
    bf16 = any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))
    cuda = torch.cuda.is_available()
    precision = "bf16 units; precision auto still takes 32-bit" if bf16 else "no bf16 units: 32-bit"
    return [
        Finding("CPU", True, f"{os.cpu_count()} cores, {precision}"),
        Finding("GPU (CUDA)", cuda, torch.cuda.get_device_name(0) if cuda else "none: training runs on the CPU"),
        Finding("GPU (Apple MPS)", torch.backends.mps.is_available(), ""),
    ]


def _cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()


def check_weights() -> list[Finding]:
    """Pretrained weights: from the hub, from its local copy, or from a file."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    cached = sorted(path.name.replace("models--timm--", "") for path in hub.glob("models--timm--*"))
    found = ", ".join(cached) or "none here: model.weights=hub needs the network once, or give a .safetensors file"
    return [Finding("pretrained weights", bool(cached), found)]


def check_resources() -> list[Finding]:
    """Memory and disk."""
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(Path.cwd()).free / 2**30
    return [
        Finding("memory available", memory > 4, f"{memory:.1f} GiB (4 is little)"),
        Finding("disk free here", disk > 10, f"{disk:.1f} GiB (a cached CT takes about 0.1 MB per slice)"),
    ]


def check_configs() -> list[Finding]:
    """Configs that come with medvit."""
    names = shipped_configs()
    return [Finding("shipped configs", bool(names), ", ".join(names))]


def check_privacy() -> list[Finding]:
    """The key of pseudonyms, and caches."""
    key = "MEDVIT_SITE_KEY" if os.environ.get("MEDVIT_SITE_KEY") else str(data.site_key_path())
    findings = [Finding("site key", True, f"{key} (made on first use; without it runs do not join)")]
    if shared := os.environ.get("MEDVIT_CACHE"):
        size = sum(path.stat().st_size for path in Path(shared).rglob("*") if path.is_file()) / 2**20
        findings.append(Finding("shared cache", True, f"{shared}: {size:.0f} MiB of pixels (PHI)"))
    return findings


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_versions,
    check_opencv,
    check_codecs,
    check_reading,
    check_devices,
    check_weights,
    check_resources,
    check_configs,
    check_privacy,
)
