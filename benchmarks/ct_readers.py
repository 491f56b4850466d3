"""Readers of one CT series, from files to Hounsfield units in memory (or a NIfTI file), each as its users call it.

Each reader gets a folder that holds the series and nothing else, and the file names in slice order: finding the series
is not part of the race. A reader that is not installed is left out and named.
"""

import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread

import medvit.io


@dataclass(frozen=True)
class Source:
    """One series, ready to be read by anybody: alone in its folder, `paths` in slice order."""

    folder: Path
    series: medvit.io.Series
    paths: tuple[Path, ...]


Reader = Callable[[Source], Any]


def read_medvit(source: Source) -> Any:
    """All checks, decoded in workers."""
    return medvit.io.read(source.series).hu


def read_pydicom(source: Source) -> Any:
    """Each slice decoded and rescaled by itself, sorted by the last coordinate, stacked. No check at all."""
    slices = sorted((dcmread(path) for path in source.paths), key=lambda one: float(one.ImagePositionPatient[2]))
    return np.stack(
        [one.pixel_array.astype(np.float32) * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices]
    )


def simpleitk() -> Reader:
    """ImageSeriesReader (GDCM)."""
    sitk = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    kept = []  # a view borrows the memory of its image; a copy would be counted against SimpleITK

    def read(source: Source) -> Any:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(path) for path in source.paths])
        kept[:] = [reader.Execute()]
        return sitk.GetArrayViewFromImage(kept[0])

    return read


def monai(reader: str, needs: str) -> Callable[[], Reader]:
    """LoadImage with one of MONAI's readers."""

    def make() -> Reader:
        importlib.import_module(needs)
        load = importlib.import_module("monai.transforms").LoadImage(reader=reader, image_only=True)
        return lambda source: load(source.folder)

    return make


def highdicom() -> Reader:
    """get_volume_from_series, display transforms off: they would invert MONOCHROME1."""
    module = importlib.import_module("highdicom")

    def read(source: Source) -> Any:
        datasets = [dcmread(path) for path in source.paths]
        return module.get_volume_from_series(datasets, dtype=np.float32, apply_presentation_lut=False).array

    return read


def dicom2nifti() -> Reader:
    """dicom_series_to_nifti, in memory, not reoriented."""
    module = importlib.import_module("dicom2nifti")
    return lambda source: module.dicom_series_to_nifti(source.folder, reorient_nifti=False)["NII"].dataobj


def dcm2niix() -> Reader:
    """The program, to an uncompressed NIfTI file without sidecar."""
    try:
        program = str(importlib.import_module("dcm2niix").bin)
    except ImportError:
        program = shutil.which("dcm2niix") or ""
    if not program:
        raise ImportError("dcm2niix")

    output = tempfile.TemporaryDirectory()  # one for all rounds: making and deleting folders is not its work

    def read(source: Source) -> Any:
        command = [program, "-z", "n", "-b", "n", "-w", "1", "-f", "ct", "-o", output.name, str(source.folder)]
        subprocess.run(command, check=True, capture_output=True)
        return Path(output.name) / "ct.nii"

    return read


PEERS: dict[str, Callable[[], Reader]] = {
    "medvit": lambda: read_medvit,
    "plain pydicom": lambda: read_pydicom,
    "SimpleITK": simpleitk,
    "MONAI PydicomReader": monai("PydicomReader", "pydicom"),
    "MONAI ITKReader": monai("ITKReader", "itk"),
    "highdicom": highdicom,
    "dicom2nifti": dicom2nifti,
    "dcm2niix": dcm2niix,
}


def installed() -> tuple[dict[str, Reader], list[str]]:
    """The readers that there are, and the names of those that there are not."""
    found, absent = {}, []
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except ImportError:
            absent.append(name)
    return found, absent
