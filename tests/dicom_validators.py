"""Other people's programs that judge the DICOM we write: dciodvfy, PixelMed's check of templates, dcmtk's dsrdump."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DCIODVFY = shutil.which("dciodvfy", path=str(Path(sys.executable).parent)) or shutil.which("dciodvfy")
JARS = Path("/usr/share/java")  # where Debian's libpixelmed-java is


def output_of(*command):
    """Both streams of a program, whatever bytes it prints."""
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return (done.stdout + done.stderr).decode("utf-8", "replace"), done.returncode


def errors_by_dciodvfy(path):
    if DCIODVFY is None:
        pytest.skip("dciodvfy (package dicom3tools) is not installed")
    said, _ = output_of(DCIODVFY, str(path))
    assert "Comprehensive3DSR" in said or "SCImage" in said  # it knows what it looks at
    return [line for line in said.splitlines() if line.startswith("Error")]


def dumped(path):
    if shutil.which("dsrdump") is None:
        pytest.skip("dsrdump (dcmtk) is not installed")
    said, code = output_of("dsrdump", str(path))
    assert code == 0, said
    return said


def said_by_pixelmed(path):
    """Errors and warnings of PixelMed's check against the templates of PS3.16."""
    if shutil.which("java") is None or not (JARS / "pixelmed.jar").exists():
        pytest.skip("PixelMed (Debian libpixelmed-java) or a Java runtime is not installed")
    limits = [f"-Djdk.xml.xpath{what}Limit=0" for what in ("TotalOp", "ExprOp", "ExprGrp")]
    main = "com.pixelmed.validate.DicomSRValidator"
    said, _ = output_of("java", "-XX:TieredStopAtLevel=1", *limits, "-cp", f"{JARS}/*", main, str(path))
    assert "Found Root Template TID_1500" in said
    assert "IOD validation complete" in said
    return [line for line in said.splitlines() if line.startswith(("Error", "Warning"))]


def false_alarm(line):
    """TID 1501 admits evaluations by any code; the validator knows those of PS3.16 alone, and warns of ours."""
    return line.startswith("Warning") and "99MEDVIT" in line and line.endswith("Content Item not in template")
