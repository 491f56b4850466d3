"""Damage to DICOM and NIfTI bytes: mutations that may or may not matter, and files that are broken for certain.

`MUTATIONS` maps bytes to bytes, `BROKEN` writes one file that no reader may take for CT. Everything is drawn from the
`Random` that is given, so that a number names a case for ever.
"""

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from ct_builder import Ct, phantom_hu
from pydicom import Dataset
from pydicom.encaps import encapsulate

LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"}
"""Value representations with a length of 32 bits after two empty bytes (PS3.5 7.1.2)."""

VRS = [*sorted(LONG), *b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US ??".split(), b"\0\0"]

NASTY_VALUES = [
    *rb"nan inf -inf 1e999 -0 0 1e-400 1\2 \ \\\\\\ ../../x =CMD() 9999999999999999 0x10 1,5 +1 1_0".split(),
    *"−5 １２ 山田".encode().split(),
    *(b" 1", b"1 ", b"\0\0\0", b"\xff\xfe", b"", b"9" * 300, b"1." + b"0" * 40),
]
"""What stands where a number or a UID should be."""


@dataclass(frozen=True)
class Element:
    """Where one top-level element of an explicit little endian file lies."""

    tag: int
    start: int
    value: int
    end: int


def elements(raw: bytes) -> list[Element]:
    """The top-level elements, file meta information first; an undefined length runs to the end of the file."""
    found, at = [], 132
    while at + 8 <= len(raw):
        tag = int.from_bytes(raw[at : at + 2], "little") << 16 | int.from_bytes(raw[at + 2 : at + 4], "little")
        wide = raw[at + 4 : at + 6] in LONG
        value = at + (12 if wide else 8)
        length = int.from_bytes(raw[at + 8 : at + 12] if wide else raw[at + 6 : at + 8], "little")
        end = len(raw) if length == 0xFFFFFFFF and wide else value + length
        found.append(Element(tag, at, value, end))
        at = end
    return found


@dataclass(frozen=True)
class Sample:
    """A good file: its bytes, where its elements lie, and where its pixels begin."""

    raw: bytes
    parts: tuple[Element, ...]

    @classmethod
    def of(cls, raw: bytes) -> "Sample":
        return cls(raw, tuple(elements(raw)))

    @property
    def pixels(self) -> Element:
        return self.parts[-1]


Mutation = Callable[[Sample, Random], bytes]


def _flip(raw: bytes, random: Random, low: int, high: int) -> bytes:
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 8, 64))):
        changed[random.randrange(low, high)] ^= 1 << random.randrange(8)
    return bytes(changed)


def flip_anywhere(sample: Sample, random: Random) -> bytes:
    return _flip(sample.raw, random, 0, len(sample.raw))


def flip_header(sample: Sample, random: Random) -> bytes:
    return _flip(sample.raw, random, 128, sample.pixels.value)


def flip_pixels(sample: Sample, random: Random) -> bytes:
    return _flip(sample.raw, random, sample.pixels.value, sample.pixels.end)


def overwrite_preamble(sample: Sample, random: Random) -> bytes:
    return random.choice((b"MZ", b"\x7fELF", b"II*\0", random.randbytes(4))).ljust(128, b"\0") + sample.raw[128:]


def overwrite_private(sample: Sample, random: Random) -> bytes:
    """Other values, of the same length, in private elements that nobody needs."""
    changed = bytearray(sample.raw)
    for part in sample.parts:
        if part.tag >> 16 & 1 and part.tag & 0xFFFF >= 0x1000:
            changed[part.value : part.end] = random.randbytes(part.end - part.value)
    return bytes(changed)


def cut(sample: Sample, random: Random) -> bytes:
    return sample.raw[: random.randrange(len(sample.raw))]


def cut_header(sample: Sample, random: Random) -> bytes:
    return sample.raw[: random.randrange(sample.pixels.value)]


def insert(sample: Sample, random: Random) -> bytes:
    at = random.randrange(len(sample.raw))
    return sample.raw[:at] + random.randbytes(random.choice((1, 2, 4, 100))) + sample.raw[at:]


def delete(sample: Sample, random: Random) -> bytes:
    at = random.randrange(len(sample.raw))
    return sample.raw[:at] + sample.raw[at + random.choice((1, 2, 4, 100)) :]


def splice(sample: Sample, random: Random) -> bytes:
    """A stretch of the file, somewhere else in it."""
    source, target = random.randrange(len(sample.raw)), random.randrange(len(sample.raw))
    piece = sample.raw[source : source + random.choice((4, 16, 64, 512))]
    return sample.raw[:target] + piece + sample.raw[target + len(piece) * random.randrange(2) :]


def _any_part(sample: Sample, random: Random) -> Element:
    return random.choice(sample.parts)


def lie_about_length(sample: Sample, random: Random) -> bytes:
    part = _any_part(sample, random)
    size = 4 if part.value - part.start == 12 else 2
    true = part.end - part.value
    lie = random.choice((0, true + 1, true + 2, max(true - 2, 0), 2 * true, 2 ** (8 * size) - 1, 2 ** (8 * size) - 2))
    lie = lie if random.random() < 0.8 else random.randrange(2 ** (8 * size))
    return sample.raw[: part.value - size] + lie.to_bytes(size, "little") + sample.raw[part.value :]


def swap_vr(sample: Sample, random: Random) -> bytes:
    part = _any_part(sample, random)
    return sample.raw[: part.start + 4] + random.choice(VRS) + sample.raw[part.start + 6 :]


def change_tag(sample: Sample, random: Random) -> bytes:
    part, other = _any_part(sample, random), _any_part(sample, random)
    tag = sample.raw[other.start : other.start + 4] if random.random() < 0.5 else random.randbytes(4)
    return sample.raw[: part.start] + tag + sample.raw[part.start + 4 :]


def nasty_value(sample: Sample, random: Random) -> bytes:
    """A value that is text where a number should be, a path, a formula, an infinity; its length is stated rightly."""
    part = random.choice([part for part in sample.parts if part.value - part.start == 8])
    value = random.choice((*NASTY_VALUES, random.randbytes(6)))
    value += b" " * (len(value) % 2)
    head = sample.raw[part.start : part.start + 6] + len(value).to_bytes(2, "little")
    return sample.raw[: part.start] + head + value + sample.raw[part.end :]


def drop_element(sample: Sample, random: Random) -> bytes:
    part = _any_part(sample, random)
    return sample.raw[: part.start] + sample.raw[part.end :]


def repeat_element(sample: Sample, random: Random) -> bytes:
    """An element a second time, out of order or right behind itself, sometimes with another value."""
    part, target = _any_part(sample, random), _any_part(sample, random)
    at = random.choice((part.end, target.start))
    piece = bytearray(sample.raw[part.start : part.end])
    if random.random() < 0.5 and len(piece) > part.value - part.start:
        piece[random.randrange(part.value - part.start, len(piece))] ^= 1
    return sample.raw[:at] + bytes(piece) + sample.raw[at:]


def exchange_elements(sample: Sample, random: Random) -> bytes:
    one, other = sorted(random.sample(sample.parts, 2), key=lambda part: part.start)
    raw = sample.raw
    return (
        raw[: one.start]
        + raw[other.start : other.end]
        + raw[one.end : other.start]
        + raw[one.start : one.end]
        + (raw[other.end :])
    )


HARMLESS: tuple[Mutation, ...] = (overwrite_private,)
"""Nothing that is read changes."""

PIXELS: tuple[Mutation, ...] = (flip_pixels,)
"""Only pixel data changes, and not its length."""

MUTATIONS: tuple[Mutation, ...] = (
    flip_anywhere,
    flip_header,
    flip_header,
    *PIXELS,
    overwrite_preamble,
    *HARMLESS,
    cut,
    cut_header,
    insert,
    delete,
    splice,
    lie_about_length,
    swap_vr,
    change_tag,
    nasty_value,
    nasty_value,
    drop_element,
    repeat_element,
    exchange_elements,
)


# ---- broken for certain ---------------------------------------------------------------------------------------------

Broken = Callable[[Random, Path, int], None]
"""(random, path without suffix, number that no other file has) -> writes one file."""


def stranger(number: int) -> Dataset:
    """A CT slice of a patient, study and series of its own."""
    dataset = Ct(hu=phantom_hu(1), uid=1, study=100_000 + number, patient=f"Stranger-{number}").dataset(0)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _write(path: Path, raw: bytes, suffix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + suffix).write_bytes(raw)


def _with(suffix: str = "", **values: object) -> Broken:
    """A good slice but for these attributes; None deletes."""

    def write(random: Random, path: Path, number: int) -> None:
        dataset = stranger(number)
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        _write(path, to_bytes(dataset), suffix)

    return write


def _object(sop_class: str, modality: str) -> Broken:
    """An object without pixels, of another SOP class."""
    return _with(SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{sop_class}", Modality=modality, PixelData=None)


def _bytes(make: Callable[[Random, bytes], bytes], suffix: str = "") -> Broken:
    """What `make` turns the bytes of a good slice into."""

    def write(random: Random, path: Path, number: int) -> None:
        _write(path, make(random, to_bytes(stranger(number))), suffix)

    return write


def _cut_header(random: Random, raw: bytes) -> bytes:
    return cut_header(Sample.of(raw), random)


def _cut_pixels(random: Random, raw: bytes) -> bytes:
    return raw[: random.randrange(Sample.of(raw).pixels.value, len(raw) - 2)]


def _scramble_header(random: Random, raw: bytes) -> bytes:
    pixels = Sample.of(raw).pixels
    return raw[:132] + random.randbytes(pixels.value - 132) + raw[pixels.value :]


def _zip(random: Random, raw: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("IM0001.dcm", raw)
    return stream.getvalue()


def _rename_uid(uid: bytes) -> Callable[[Random, bytes], bytes]:
    """SeriesInstanceUID and what is derived from it become a string that is no UID."""
    return lambda random, raw: raw.replace(b"1.2.826.0.1.3680043.8.498", uid.ljust(25, b"x"))


def _relabel(syntax: bytes) -> Callable[[Random, bytes], bytes]:
    """Native pixels said to be in another transfer syntax."""

    def make(random: Random, raw: bytes) -> bytes:
        (part,) = (part for part in elements(raw) if part.tag == 0x00020010)
        assert part.end - part.value >= len(syntax)
        return raw[: part.value] + syntax.ljust(part.end - part.value, b"\0") + raw[part.end :]

    return make


def _encapsulated_noise(random: Random, path: Path, number: int) -> None:
    """A JPEG-LS slice whose code stream is noise: only decoding can tell."""
    dataset = stranger(number)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"
    dataset.PixelData = encapsulate([random.randbytes(400)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    _write(path, to_bytes(dataset))


def _deflated_noise(random: Random, path: Path, number: int) -> None:
    """A good file meta information, and noise where the deflated dataset should be."""
    dataset = stranger(number)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    raw = to_bytes(dataset)
    begin = 144 + int.from_bytes(raw[140:144], "little")  # behind (0002,0000), the length of its group
    _write(path, raw[:begin] + random.randbytes(len(raw) - begin))


def _link(random: Random, path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")


def _pipe(random: Random, path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


PNG = b"\x89PNG\r\n\x1a\n"
CONSTANT = np.full((20, 24), 1024, "<u2").tobytes()

BROKEN: dict[str, Broken] = {
    "empty": _bytes(lambda random, raw: b""),
    "zeros": _bytes(lambda random, raw: bytes(random.randrange(1, 4000)), ".dcm"),
    "random": _bytes(lambda random, raw: random.randbytes(random.randrange(1, 4000)), ".dcm"),
    "random behind DICM": _bytes(lambda random, raw: bytes(128) + b"DICM" + random.randbytes(random.randrange(4000))),
    "text": _bytes(lambda random, raw: b"patient moved; repeat tomorrow\n" * random.randrange(1, 50), ".txt"),
    "page": _bytes(lambda random, raw: b"<html><body>504 Gateway Timeout</body></html>", ".dcm"),
    "picture": _bytes(lambda random, raw: PNG + random.randbytes(500), ".png"),
    "program": _bytes(lambda random, raw: b"\x7fELF" + random.randbytes(500)),
    "archive": _bytes(_zip, ".zip"),
    "compressed file": _bytes(lambda random, raw: gzip.compress(raw), ".dcm.gz"),
    "preamble alone": _bytes(lambda random, raw: raw[:132]),
    "cut header": _bytes(_cut_header),
    "cut pixels": _bytes(_cut_pixels),
    "scrambled header": _bytes(_scramble_header),
    "noise for JPEG-LS": _encapsulated_noise,
    "noise for deflate": _deflated_noise,
    "native called RLE": _bytes(_relabel(b"1.2.840.10008.1.2.5")),
    "unknown syntax": _bytes(_relabel(b"1.2.840.10008.1.2.9")),
    "path for UID": _bytes(_rename_uid(b"../../../etc/passwd")),
    "NIfTI of junk": _bytes(lambda random, raw: random.randbytes(800), ".nii"),
    "NIfTI cut": _bytes(
        lambda random, raw: gzip.compress(random.randbytes(4000))[: random.randrange(20, 3000)], ".nii.gz"
    ),
    "NRRD of junk": _bytes(lambda random, raw: b"NRRD0004\n" + random.randbytes(100), ".nrrd"),
    "MetaImage of junk": _bytes(lambda random, raw: b"ObjectType = Image\n" + random.randbytes(100), ".mha"),
    "link to nowhere": _link,
    "pipe": _pipe,
    "report": _object("88.33", "SR"),
    "PDF": _object("104.1", "DOC"),
    "presentation state": _object("11.1", "PR"),
    "key object": _object("88.59", "KO"),
    "plan": _object("481.5", "RTPLAN"),
    "capture": _with(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT"),
    "MR": _with(SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR"),
    "no such class": _with(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.99"),
    "localizer": _with(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "colour": _with(SamplesPerPixel=3, PhotometricInterpretation="RGB"),
    "frames without positions": _with(NumberOfFrames=5),
    "no instance": _with(SOPInstanceUID=None),
    "no series": _with(SeriesInstanceUID=None),
    "no rows": _with(Rows=None),
    "rows 0": _with(Rows=0),
    "rows 65535": _with(Rows=65535),
    "no rescale": _with(RescaleSlope=None, RescaleIntercept=None),
    "slope 0": _with(RescaleSlope=0),
    "slope below 0": _with(RescaleSlope=-1),
    "no intercept": _with(RescaleIntercept=""),
    "other units": _with(RescaleType="US"),
    "no position": _with(ImagePositionPatient=None),
    "no orientation": _with(ImageOrientationPatient=None),
    "skew orientation": _with(ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]),
    "no spacing": _with(PixelSpacing=None),
    "spacing 0": _with(PixelSpacing=[0, 0.7]),
    "one value": _with(PixelData=CONSTANT),
    "high bit beyond": _with(HighBit=20),
    "no pixels": _with(PixelData=None),
}
