"""The lean header walk against pydicom: on its bundled files, on hand-made encodings, and on what it must refuse."""

import contextlib
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from ct_builder import Ct
from pydicom import Dataset, Sequence, dcmread
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.tag import Tag

from medvit.io import elements, scan_folder
from medvit.io.elements import read_elements
from medvit.io.headers import RECENT, HeaderReader
from medvit.records import ReasonCode, ScanError

BUNDLED = sorted(p for p in (Path(pydicom.__file__).parent / "data" / "test_files").rglob("*") if p.is_file())
FLAT = {tag: what for tag, what in elements.WANTED.items() if isinstance(what, str)}


def test_wanted_tags_have_the_names_of_the_standard():
    assert {tag: keyword_for_tag(tag) for tag in FLAT} == FLAT
    binary = {name for name in FLAT.values() if set(dictionary_VR(tag_for_keyword(name)).split()) & {"US", "SS", "UL"}}
    assert binary == elements.INTEGERS & set(FLAT.values())


def as_pydicom_has_it(dataset, keyword):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = dataset.get(keyword)
    if value is None or value == "":
        return ()
    parts = [value] if isinstance(value, str | int | float | bytes) or not hasattr(value, "__iter__") else list(value)
    return tuple(str(part).strip(" \0") for part in parts)


def as_we_have_it(found, keyword):
    raw = found.values.get(keyword, b"")
    if keyword in elements.INTEGERS:
        order = "little" if found.little else "big"
        return tuple(str(int.from_bytes(raw[:4], order)) for _ in raw[:1])
    text = raw.decode("latin-1").strip(" \0")
    return tuple(part.strip(" \0") for part in text.split("\\")) if text else ()


COMPARED = "SOPInstanceUID SeriesInstanceUID StudyInstanceUID Modality Rows Columns BitsStored ImagePositionPatient"
COMPARED += " ImageOrientationPatient PixelSpacing RescaleSlope RescaleIntercept NumberOfFrames PatientID ImageType"


@pytest.mark.parametrize("path", BUNDLED, ids=[p.name for p in BUNDLED])
def test_bundled_files_say_the_same_as_to_pydicom(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = dcmread(path, stop_before_pixels=True)
        except Exception:  # noqa: BLE001  what pydicom refuses, we may refuse or read
            dataset = None
        if dataset is None:
            with contextlib.suppress(ScanError):
                read_elements(path, "x")
            return
        found = read_elements(path, "x")
        for keyword in COMPARED.split():
            if keyword in dataset:
                assert as_we_have_it(found, keyword) == as_pydicom_has_it(dataset, keyword), keyword
        if "TransferSyntaxUID" in dataset.file_meta:
            assert found.transfer_syntax == dataset.file_meta.TransferSyntaxUID


def read_back(tmp_path, dataset, **how) -> elements.Elements:
    path = tmp_path / "x.dcm"
    dataset.save_as(path, enforce_file_format="file_meta" in dataset.__dict__ and bool(dataset.file_meta), **how)
    return read_elements(path, "x")


def with_sequences():
    dataset = Ct().dataset(0)
    inner, outer = Dataset(), Dataset()
    inner.CodeValue, inner.Rows = "inner", 7
    outer.ConceptCodeSequence = Sequence([inner, inner])
    dataset.RequestAttributesSequence = Sequence([outer])
    dataset.add_new(0x00091010, "UN", b"x" * 11)
    dataset.add_new(0x00091011, "OB", b"y" * 70_000)
    return dataset


@pytest.mark.parametrize("undefined", [False, True], ids=["defined lengths", "undefined lengths"])
@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_sequences_and_long_private_values_are_skipped_not_read_into(tmp_path, undefined, implicit, little):
    dataset = with_sequences()
    for sequence in (dataset["RequestAttributesSequence"], dataset.RequestAttributesSequence[0]["ConceptCodeSequence"]):
        sequence.is_undefined_length = undefined
        for item in sequence.value:
            item.is_undefined_length_sequence_item = undefined
    dataset.file_meta.TransferSyntaxUID = {(True, True): "1.2.840.10008.1.2", (False, True): "1.2.840.10008.1.2.1"}.get(
        (implicit, little), "1.2.840.10008.1.2.2"
    )
    found = read_back(tmp_path, dataset, implicit_vr=implicit, little_endian=little)
    assert as_we_have_it(found, "Rows") == ("20",)
    assert found.values["SOPInstanceUID"].strip(b"\0").decode() == dataset.SOPInstanceUID
    keyword, offset, length = found.pixels
    assert (keyword, length) == ("PixelData", 960)
    assert (tmp_path / "x.dcm").read_bytes()[offset : offset + 960] == dataset.PixelData


def test_numbers_in_another_vr_than_the_standard_says_are_read(tmp_path):
    dataset = Ct().dataset(0)
    del dataset.RescaleSlope, dataset.Rows
    dataset.add_new("RescaleSlope", "FD", 1.5)
    dataset.add_new("Rows", "IS", "20")
    path = tmp_path / "x.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    (header,) = HeaderReader().read(path, "x")
    assert (header.slope, header.shared.rows) == (1.5, 20)


@pytest.mark.parametrize("depth", [10, 60, 70, 5000])
def test_nesting_is_bounded_whatever_the_depth(tmp_path, depth):
    (path,) = Ct().write(tmp_path, only=[0])
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x08\x00\x99\x99SQ\x00\x00\xff\xff\xff\xff"
    close = b"\xfe\xff\xdd\xe0\0\0\0\0\xfe\xff\x0d\xe0\0\0\0\0"
    nested = b"\x08\x00\x99\x99SQ\x00\x00\xff\xff\xff\xff" + item * depth + close * depth + b"\xfe\xff\xdd\xe0\0\0\0\0"
    raw = path.read_bytes()
    at = raw.index(b"\x10\x00\x10\x00PN")
    path.write_bytes(raw[:at] + nested + raw[at:])
    if depth < elements.MAX_DEPTH - 1:
        assert as_we_have_it(read_elements(path, "x"), "Rows") == ("20",)
        return
    with pytest.raises(ScanError) as caught:
        read_elements(path, "x")
    assert caught.value.code is ReasonCode.NESTING


def test_a_deflated_bomb_is_refused_within_its_bound(tmp_path):
    """64 MB of header from 64 kB of file; what a plain reader would inflate whole."""
    (path,) = Ct(transfer_syntax="1.2.840.10008.1.2.1.99").write(tmp_path, only=[0])
    raw = path.read_bytes()
    start = 144 + int.from_bytes(raw[140:144], "little")
    data = zlib.decompress(raw[start:], -15)
    at = data.index(b"\x10\x00\x10\x00PN")
    huge = 3 << 30
    head = data[:at] + b"\x09\x00\x10\x10OB\0\0" + huge.to_bytes(4, "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(head) + b"".join(packer.compress(bytes(1 << 24)) for _ in range(8)) + packer.flush()
    path.write_bytes(raw[:start] + packed)
    with pytest.raises(ScanError) as caught:
        read_elements(path, "x")
    assert caught.value.code is ReasonCode.RESOURCE_LIMIT


@pytest.mark.parametrize("length", [0, 1, 100, 131, 132, 140, 200, 300, 600, 900])
def test_a_file_cut_anywhere_is_never_used(tmp_path, length):
    (path,) = Ct().write(tmp_path, only=[0])
    path.write_bytes(path.read_bytes()[:length])
    (entry,) = scan_folder(tmp_path).files
    assert entry.outcome.bad
    assert entry.code is not None


def test_a_hundred_slices_share_what_they_have_in_common(tmp_path):
    paths = Ct(hu=np.zeros((100, 4, 4))).write(tmp_path)
    reader = HeaderReader()
    found = [one for path in paths for one in reader.read(path, str(path))]
    assert len({id(one.shared) for one in found}) == 1
    assert len({id(one.position[0]) for one in found}) == 1


def test_mixed_series_share_what_each_has_in_common(tmp_path):
    hu = np.zeros((2, 4, 4))
    series = [
        Ct(hu=hu, edit=lambda dataset, _, n=n: setattr(dataset, "SeriesInstanceUID", f"1.2.{n}")).write(
            tmp_path / f"{n}"
        )
        for n in range(RECENT + 10)
    ]
    reader, told = HeaderReader(), []
    reader.tell = lambda digest, _: told.append(digest)
    found = [reader.read(paths[k], "x")[0].shared for k in range(2) for paths in series]
    assert len({id(one) for one in found}) == len({one.series_uid for one in found}) == len(series)
    assert told == [one.digest for one in found[: len(series)]]  # each once, for an index to keep


def test_tag_order_of_the_walk_is_that_of_the_file(tmp_path):
    assert list(elements.WANTED) == sorted(elements.WANTED)
    assert all(Tag(tag) == tag for tag in elements.WANTED)
