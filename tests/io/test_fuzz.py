"""Mutated files: a right volume, a legal other reading, or a code; never another error, never a silent loss.

One of three slices is mutated, so that each case shows what damage does to a series. pydicom and nibabel are the second
opinion on what a mutated file says. The number of a failing case is all that is needed to see it again: `-k` picks the
encoding, `replay` makes the bytes.
"""

import gzip
import io
import resource
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import nibabel as nib
import numpy as np
import pytest
from any_series import SYNTAXES, AnySeries, any_edit, assert_conserved, same
from ct_builder import Ct, Grid
from damage import HARMLESS, MUTATIONS, PIXELS, Sample, flip_anywhere
from pydicom import Dataset, dcmread

from medvit.io import read, read_files, scan_folder
from medvit.records import REASONS, ReasonCode, Scan, ScanError

RAS_TO_LPS = np.diag([-1.0, -1, 1, 1])
ENCODINGS = ("explicit", "JPEG-LS", "JPEG 2000", "RLE")
SLICES = 3
NEEDED = """ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns RescaleSlope
    RescaleIntercept""".split()
RESAMPLED = {ReasonCode.GANTRY_TILT}
"""Flags under which planes are not those of the files."""

in_suite_and_exhaustive = pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
"""Of each of five formats: 3,000 in the suite, 50,000 with -m slow."""


@dataclass
class Target:
    """A clean series on disk, and what it is read as."""

    root: Path
    paths: list[Path]
    samples: list[Sample]
    scan: Scan

    def plane(self, path: Path) -> np.ndarray:
        return self.scan.hu[self.scan.files.index(str(path))]


def target(root: Path, syntax: str) -> Target:
    z, y, x = np.indices((SLICES, 33, 36))
    edit = any_edit(Random(3), SLICES)  # with private elements
    hu = -1000 + 11 * x + 3 * y + 40 * z
    hu[:, 10:14, 20:25] += 3000  # metal: stored with the highest bit set, so that a wrong sign shows
    cts = tuple(Ct(hu=hu, transfer_syntax=syntax, edit=edit) for _ in range(SLICES))
    paths = AnySeries(Grid(), hu, cts, tuple(f"IM{n}" for n in range(SLICES))).write(root)
    samples = [Sample.of(path.read_bytes()) for path in paths]
    assert all(sample.pixels.tag == 0x7FE00010 for sample in samples)
    assert all(any(part.tag == 0x00291010 for part in sample.parts) for sample in samples)
    return Target(root, paths, samples, read(root))


def replay(encoding: str, number: int, samples: list[Sample]) -> tuple[int, Callable, bytes]:
    """Which slice is mutated by case `number`, how, and into what."""
    random = Random(crc32(f"{encoding} {number}".encode()))
    victim, mutation = random.randrange(len(samples)), MUTATIONS[number % len(MUTATIONS)]
    return victim, mutation, mutation(samples[victim], random)


# ---- DICOM ----------------------------------------------------------------------------------------------------------


@in_suite_and_exhaustive
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mutated_slice_gives_the_truth_a_legal_reading_or_a_code(tmp_path, encoding, count):
    clean = target(tmp_path, SYNTAXES[encoding])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures = []
    for number in range(count):
        victim, mutation, raw = replay(encoding, number, clean.samples)
        clean.paths[victim].write_bytes(raw)
        try:
            judge(clean, victim, mutation)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  one Rust panic must not hide the other cases
            failures.append(f"{number} {mutation.__name__}: {type(error).__name__} {str(error)[:300]}")
        finally:
            clean.paths[victim].write_bytes(clean.samples[victim].raw)
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:40])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024, "the parent grew by over 200 MB"


def attempt(door: Callable[..., Scan], source: object) -> Scan | ReasonCode:
    """A scan or the code of its refusal; any other error is one too many."""
    try:
        return door(source)
    except ScanError as error:
        return ReasonCode(error.code)


def judge(clean: Target, victim: int, mutation: Callable) -> None:
    """Everything that must hold after one mutation."""
    inventory = scan_folder(clean.root)
    assert_conserved(inventory, clean.root)
    scans = []
    for series in inventory.series:
        assert series.usable or series.codes
        if isinstance(scan := attempt(read, series), Scan):
            assert series.usable
            scans.append(scan)
            agree_with_files(clean, victim, scan)
            agree_on_uids(clean, victim, scan)
    if not any(len(scan.hu) == SLICES for scan in scans):
        assert mutation not in HARMLESS, [series.codes for series in inventory.series]
        # the three files as one series, by the other door
        if isinstance(scan := attempt(read_files, clean.paths), Scan):
            agree_with_files(clean, victim, scan)
    for scan in scans:
        if mutation in HARMLESS:
            assert same(scan, clean.scan)
        if mutation in PIXELS:
            assert scan.affine.tobytes() == clean.scan.affine.tobytes()
            assert scan.header == clean.scan.header


def agree_with_files(clean: Target, victim: int, scan: Scan) -> None:
    """Untouched slices are what they were, where they were; the mutated one is what pydicom says that it is."""
    if RESAMPLED & set(scan.codes):
        return
    assert len(scan.files) == len(scan.hu) == len(scan.header.sop_uids)
    mutated = str(clean.paths[victim])
    for k, name in enumerate(scan.files):
        if name == mutated:
            agree_on_slice(clean, victim, scan, k)
        else:
            assert np.array_equal(scan.hu[k], clean.plane(Path(name)))
            before = clean.scan.affine @ (0, 0, clean.scan.files.index(name), 1)
            assert np.abs(scan.affine @ (0, 0, k, 1) - before).max() <= 0.1
    if len(scan.hu) == SLICES - 1 and victim == 1 and mutated not in scan.files:
        assert scan.codes, "the slice in the middle is gone and nobody is told"


# ---- the second opinion ---------------------------------------------------------------------------------------------
# What pydicom says of the mutated file. What it refuses to say must be as it was before: damage that medvit overlooks.


@dataclass
class Opinion:
    """pydicom's reading of one file, with that of the undamaged file to fall back on."""

    path: Path
    before: bytes

    def ask(self, question: Callable[[Any], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = question(dcmread(io.BytesIO(self.before)))
            try:
                dataset = repaired(dcmread(self.path, force=True))
                answer = question(dataset if "PixelData" in dataset else None)  # None: it lost its way
            except Exception:  # noqa: BLE001  pydicom raises nine types and more
                return before
        # another number of values is no answer (text read as another VR), but another matrix is one
        return answer if np.shape(answer) == np.shape(before) or question is pixels_of else before


def repaired(dataset: Dataset) -> Dataset:
    """With what pydicom wants and medvit can do without: one sample, and the transfer syntax found by looking."""
    if "SamplesPerPixel" not in dataset:
        dataset.SamplesPerPixel = 1
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        syntax = "implicit" if implicit else "explicit" if little else "big endian"
        dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    return dataset


def uid_of(keyword: str) -> Callable[[Dataset], str]:
    def ask(dataset: Dataset) -> str:
        if keyword in dataset and dataset[keyword].VR == "AT":
            raise TypeError  # a UID read as pairs of numbers is no opinion
        return str(dataset[keyword].value if keyword in dataset else "").strip(" \0")

    return ask


def numbers_of(keyword: str) -> Callable[[Dataset], np.ndarray]:
    return lambda dataset: np.array(dataset[keyword].value, dtype=float)


def pixels_of(dataset: Dataset) -> np.ndarray:
    return dataset.pixel_array


def agree_on_uids(clean: Target, victim: int, scan: Scan) -> None:
    """The header of the scan has the UIDs of the mutated file, if that is in it."""
    path = clean.paths[victim]
    if str(path) in scan.files:
        opinion = Opinion(path, clean.samples[victim].raw)
        for keyword, uid in {
            "StudyInstanceUID": scan.header.study_uid,
            "SeriesInstanceUID": scan.header.series_uid,
            "SOPInstanceUID": scan.header.sop_uids[scan.files.index(str(path))],
        }.items():
            assert uid == opinion.ask(uid_of(keyword)), keyword


def agree_on_slice(clean: Target, victim: int, scan: Scan, k: int) -> None:
    """Rows, columns, position, orientation, spacing, slope and intercept, through what they do to slice k of a scan."""
    opinion = Opinion(clean.paths[victim], clean.samples[victim].raw)
    first, way, spacing, rows, columns, slope, intercept = (opinion.ask(numbers_of(keyword)) for keyword in NEEDED)
    assert scan.hu.shape[1:] == (rows, columns)
    down, right = way[3:] * spacing[0] * (rows - 1), way[:3] * spacing[1] * (columns - 1)  # PS3.3 C.7.6.2.1.1
    corners = np.array([[0, 0, k, 1], [columns - 1, 0, k, 1], [0, rows - 1, k, 1]])
    assert np.abs(corners @ scan.affine[:3].T - (first, first + right, first + down)).max() <= 0.1
    if ReasonCode.PADDING_APPLIED not in scan.codes:
        stored = opinion.ask(pixels_of)
        assert np.allclose(scan.hu[k], stored * slope + intercept, rtol=1e-6, atol=1e-3)


# ---- what the 50,000 found ------------------------------------------------------------------------------------------


def with_value(tag: int, value: bytes) -> Callable[[Sample], bytes]:
    def change(sample: Sample) -> bytes:
        (part,) = (part for part in sample.parts if part.tag == tag)
        assert part.end - part.value == len(value)
        return sample.raw[: part.value] + value + sample.raw[part.end :]

    return change


def without_last_bytes(sample: Sample) -> bytes:
    """Eight bytes less at the end of the only frame: its item now reaches over the delimiter behind it."""
    assert sample.raw[-8:] == b"\xfe\xff\xdd\xe0\0\0\0\0"
    return sample.raw[:-16] + sample.raw[-8:]


def with_pixels_twice(sample: Sample) -> bytes:
    """The second time with another value."""
    again = bytearray(sample.raw[sample.pixels.start :])
    again[-3] ^= 1
    return sample.raw + bytes(again)


FOUND: dict[str, tuple[str, Callable[[Sample], bytes]]] = {
    "sign neither 0 nor 1": ("explicit", with_value(0x00280103, b"\x00\x01")),
    "sign neither 0 nor 1, compressed": ("RLE", with_value(0x00280103, b"\x02\x00")),
    "high bit that the code stream contradicts": ("JPEG 2000", with_value(0x00280102, b"\x0f\x00")),
    "bytes lost at the end of an RLE frame": ("RLE", without_last_bytes),
    "pixel data twice": ("explicit", with_pixels_twice),
    "bits stored that are text": ("explicit", with_value(0x00280101, b"nn")),
}
"""Damage that some version took for a good slice, or met with an error of its own."""


@pytest.mark.parametrize("what", FOUND)
def test_damage_that_was_once_overlooked_is_refused(tmp_path, what):
    encoding, change = FOUND[what]
    clean = target(tmp_path, SYNTAXES[encoding])
    clean.paths[1].write_bytes(change(clean.samples[1]))
    refused = attempt(read_files, clean.paths)
    assert isinstance(refused, ReasonCode)
    assert REASONS[refused].outcome.bad


# ---- NIfTI ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nifti(tmp_path) -> bytes:
    z, y, x = np.indices((4, 5, 6))
    image = nib.Nifti1Image((-1000 + 11 * x + 3 * y + 40 * z).astype(np.int16).transpose(2, 1, 0), None)
    affine = RAS_TO_LPS @ Grid().affine
    image.header.set_slope_inter(1, 0)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "clean.nii")
    raw = (tmp_path / "clean.nii").read_bytes()
    (tmp_path / "clean.nii").unlink()
    return raw


def nifti_mutations(raw: bytes, count: int) -> Iterator[tuple[int, str, bytes]]:
    """Plain files flipped and cut, and the same within and around a gzip stream."""
    packed = gzip.compress(raw, mtime=0)
    for number in range(count):
        random = Random(number)
        whole, suffix = random.choice(((raw, ".nii"), (raw, ".nii"), (packed, ".nii.gz")))
        match number % 4:
            case 0:
                mutated = flip_anywhere(Sample(whole, ()), random)
            case 1:  # the header, where most bytes matter
                mutated = flip_anywhere(Sample(raw[:352], ()), random) + raw[352:]
                suffix = ".nii"
            case 2:
                mutated = whole[: random.randrange(len(whole))]
            case _:
                mutated = gzip.compress(flip_anywhere(Sample(raw[:352], ()), random) + raw[352:])
                suffix = ".nii.gz"
        yield number, suffix, mutated


@in_suite_and_exhaustive
def test_a_mutated_nifti_gives_what_nibabel_says_or_a_code(tmp_path, nifti, count):
    failures = []
    for number, suffix, mutated in nifti_mutations(nifti, count):
        path = tmp_path / f"ct{suffix}"
        path.write_bytes(mutated)
        try:
            judge_nifti(path, nifti, mutated)
        except Exception as error:  # noqa: BLE001  all cases are told, not the first alone
            failures.append(f"{number}: {type(error).__name__} {str(error)[:300]}")
        path.unlink()
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:40])


def judge_nifti(path: Path, clean: bytes, mutated: bytes) -> None:
    inventory = scan_folder(path.parent)
    assert_conserved(inventory, path.parent)
    if not isinstance(scan := attempt(read, path), Scan):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = nib.load(path)
        values, affine = np.asarray(image.dataobj, np.float64), RAS_TO_LPS @ image.affine
    assert np.allclose(scan.hu, values.reshape(values.shape[:3]).transpose(2, 1, 0))
    assert np.allclose(scan.affine, affine, atol=0.1)
    plain = gzip.decompress(mutated) if path.suffix == ".gz" else mutated  # a broken check sum ends here
    if plain[:352] == clean[:352]:
        assert scan.hu.shape == (4, 5, 6)
        assert np.allclose(scan.affine, Grid().affine, atol=1e-4)
    if plain == clean:
        assert np.array_equal(scan.hu.ravel(), np.frombuffer(clean[352:], "<i2"))
