"""The file itself: transfer syntax, length, framing, damage, bombs, names, links, archives, files that still grow."""

import gzip
import io
import os
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from ct_builder import (
    GRIDS,
    SIZ_HEIGHT,
    SIZ_WIDTH,
    SLICES,
    Ct,
    EnhancedCt,
    both,
    change,
    phantom_hu,
    put,
)
from hazard_cases import (
    ALL_GEOMETRIES,
    GEOMETRIES,
    C,
    Expected,
    Truth,
    assert_never_silently_wrong,
    ct_on,
    refused,
    right,
)
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

import medvit
from medvit.io import read, scan_folder
from medvit.records import ScanError

LOSSLESS = {
    "implicit little endian": ImplicitVRLittleEndian,
    "explicit little endian": ExplicitVRLittleEndian,
    "explicit big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG lossless": JPEGLosslessSV1,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
}
COMPRESSED = {name: uid for name, uid in LOSSLESS.items() if uid.is_encapsulated}
NO_HANG_S = 60
"""Far above what any of these cases takes: a reader that waits for ever fails its test, not the whole run."""
CONTAINERS = {"12 bits": {}, "16 bits signed": {"signed": True, "bits_stored": 16, "intercept": 0.0}}


@pytest.fixture(autouse=True)
def no_hang():
    def give_up(*_):
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(NO_HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- transfer syntaxes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_each_lossless_transfer_syntax_gives_the_exact_values(tmp_path, name, container):
    ct = ct_on("oblique", LOSSLESS[name], **CONTAINERS[container])
    ct.write(tmp_path)
    (scan,) = assert_never_silently_wrong(tmp_path, right(ct))
    np.testing.assert_array_equal(np.sort(scan.hu.ravel()), np.sort(phantom_hu().ravel()))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ALL_GEOMETRIES)
@pytest.mark.parametrize("slopes", [(1.0,), (1.0, 0.5, 0.25)], ids=str)
@pytest.mark.parametrize("name", LOSSLESS)
def test_each_lossless_transfer_syntax_in_any_geometry(tmp_path, name, geometry, slopes):
    ct = ct_on(geometry, LOSSLESS[name], slopes=slopes, bits_stored=16)
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("layout", ["many fragments", "offset table", "no final delimiter"])
def test_fragments_of_a_frame_belong_together(tmp_path, name, layout):
    """PS3.5 A.4: one frame may be cut into fragments, and the offset table may be empty."""

    def reframe(dataset, index):
        (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
        count = 3 if layout == "many fragments" and dataset.file_meta.TransferSyntaxUID != RLELossless else 1
        dataset.PixelData = encapsulate([frame], fragments_per_frame=count, has_bot=layout == "offset table")
        dataset["PixelData"].is_undefined_length = True

    paths = Ct(transfer_syntax=COMPRESSED[name], damage=reframe).write(tmp_path)
    if layout == "no final delimiter":
        for path in paths:
            assert path.read_bytes().endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
            path.write_bytes(path.read_bytes()[:-8])
        assert_never_silently_wrong(tmp_path, right(Ct()), refused(C.PIXEL_TRUNCATED))
    else:
        assert_never_silently_wrong(tmp_path, right(Ct()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("syntax", [JPEGLSNearLossless, JPEG2000], ids=["JPEG-LS near-lossless", "JPEG 2000 lossy"])
def test_lossy_pixels_are_flagged(tmp_path, syntax, geometry):
    ct = ct_on(geometry, syntax, bits_stored=16)
    ct.write(tmp_path)
    (scan,) = [read(series) for series in scan_folder(tmp_path).series]
    assert C.LOSSY in scan.codes
    assert np.abs(np.sort(scan.hu.ravel()) - np.sort(phantom_hu().ravel())).max() < 60
    assert scan.hu.shape == phantom_hu().shape


@pytest.mark.parametrize("tags", [{"LossyImageCompression": "01"}, {"LossyImageCompression": b"01"}], ids=str)
def test_pixels_that_were_lossy_once_are_flagged(tmp_path, tags):
    """Decompressing brings nothing back; the tag stays."""
    Ct(damage=change(**tags)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct(), C.LOSSY))


@pytest.mark.parametrize("value", ["00", None, ""])
def test_pixels_that_never_were_lossy_are_not_flagged(tmp_path, value):
    Ct(damage=change(LossyImageCompression=value)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


UNREADABLE_SYNTAXES = ["1.2.840.10008.1.2.99", "1.2.840.10008.1.2.4.102", "1.2.840.113619.5.2", "9.9", "x"]


def claim(path, uid):
    """Write another transfer syntax over explicit little endian, which stays what it is."""
    raw = path.read_bytes()
    true = b"\x02\0\x10\0UI" + struct.pack("<H", 20) + ExplicitVRLittleEndian.encode() + b"\0"
    uid = uid.encode() + b"\0" * (len(uid) % 2)
    assert raw.count(true) == 1
    raw = raw.replace(true, b"\x02\0\x10\0UI" + struct.pack("<H", len(uid)) + uid)
    group_length = int.from_bytes(raw[140:144], "little") + len(uid) - 20
    path.write_bytes(raw[:140] + struct.pack("<I", group_length) + raw[144:])


@pytest.mark.parametrize("uid", UNREADABLE_SYNTAXES)
def test_a_transfer_syntax_without_a_codec_is_refused(tmp_path, uid):
    """MPEG-4, GE's private big endian, nonsense: never a guess."""
    for path in Ct().write(tmp_path):
        claim(path, uid)
    assert_never_silently_wrong(tmp_path, refused((C.TS_UNSUPPORTED, C.TAG_INVALID)))


@pytest.mark.parametrize("name", COMPRESSED)
def test_native_pixels_that_claim_compression_are_refused(tmp_path, name):
    for path in Ct().write(tmp_path):
        claim(path, COMPRESSED[name])
    assert_never_silently_wrong(tmp_path, refused((C.PIXEL_TRUNCATED, C.TS_UNSUPPORTED, C.TAG_INVALID)))


# ---- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("cut", [0.9, 0.6])
def test_one_cut_slice_refuses_its_series(tmp_path, name, cut):
    """Never one slice less. A cut may hit a header too: then that file is rejected, and the rest has a gap."""
    path = Ct(transfer_syntax=LOSSLESS[name]).write(tmp_path)[5]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    beside_a_gap = Expected(aside={C.SLICE_MISSING: SLICES - 1, (C.PIXEL_TRUNCATED, C.TAG_INVALID): 1})
    assert_never_silently_wrong(tmp_path, refused(C.PIXEL_TRUNCATED), refused(C.TAG_INVALID), beside_a_gap)


@pytest.mark.parametrize("length", [0, 2, 958, 962, 1920])
def test_native_pixels_of_another_length_are_refused(tmp_path, length):
    def resize(dataset, index):
        if index == 7:
            dataset.PixelData = (dataset.PixelData * 3)[:length]

    Ct(edit=resize).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.PIXEL_TRUNCATED))


def test_no_pixels_at_all_are_refused(tmp_path):
    Ct(damage=change(7, PixelData=None)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.PIXEL_TRUNCATED))


@pytest.mark.parametrize("trailer", [b"\0", b"\0" * 512, b"</html>", b"\xfc\xff\xfc\xff\x00\x00OB"], ids=len)
def test_bytes_behind_the_pixels_change_nothing(tmp_path, trailer):
    """Some archives pad files to blocks."""
    for path in Ct().write(tmp_path):
        path.write_bytes(path.read_bytes() + trailer)
    assert_never_silently_wrong(tmp_path, right(Ct()), refused((C.PIXEL_TRUNCATED, C.TAG_INVALID)))


# ---- framing and header ---------------------------------------------------------------------------------------------


def strip(path, *, keep_meta):
    """Cut the preamble off, and the file meta information too."""
    raw = path.read_bytes()
    meta_end = 144 + int.from_bytes(raw[140:144], "little")
    path.write_bytes(raw[132 if keep_meta else meta_end :])


@pytest.mark.parametrize("keep_meta", [True, False], ids=["meta kept", "no meta"])
@pytest.mark.parametrize("name", ["implicit little endian", "explicit little endian", "explicit big endian"])
@pytest.mark.parametrize("at", [range(SLICES), [5]], ids=["all slices", "one slice"])
def test_without_preamble_it_is_read_and_flagged(tmp_path, name, keep_meta, at):
    paths = Ct(transfer_syntax=LOSSLESS[name]).write(tmp_path)
    for index in at:
        strip(paths[index], keep_meta=keep_meta)
    assert_never_silently_wrong(tmp_path, right(Ct(), C.NO_PREAMBLE))


def test_without_transfer_syntax_it_is_found_out_or_refused(tmp_path):
    Ct(damage=lambda dataset, index: dataset.file_meta.__delitem__("TransferSyntaxUID")).write(tmp_path)
    assert_never_silently_wrong(
        tmp_path, right(Ct(), may=frozenset({C.NO_PREAMBLE})), refused((C.TAG_INVALID, C.TS_UNSUPPORTED))
    )


@pytest.mark.parametrize("magic", [b"MZ\x90\0\3\0\0\0", b"\x7fELF\2\1\1\0"], ids=["PE", "ELF"])
@pytest.mark.parametrize("at", [range(SLICES), [5]], ids=["all slices", "one slice"])
def test_a_preamble_that_runs_is_flagged(tmp_path, magic, at):
    paths = Ct().write(tmp_path)
    for index in at:
        raw = paths[index].read_bytes()
        paths[index].write_bytes(magic + raw[len(magic) :])
    assert_never_silently_wrong(tmp_path, right(Ct(), C.PREAMBLE_EXEC))


def test_a_preamble_for_tiff_readers_is_no_fault(tmp_path):
    """PS3.10 7.1 allows it."""
    for path in Ct().write(tmp_path):
        path.write_bytes(b"II*\0" + path.read_bytes()[4:])
    assert_never_silently_wrong(tmp_path, right(Ct()))


def private(dataset, index):
    block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x10, "OB", bytes(range(256)) * 30)
    block.add_new(0x11, "LO", ["a", "b", "c"])
    block.add_new(0x12, "UN", b"\x07\x00\xff")
    dataset.add_new(0x00091010, "UN", b"\x01\x02\x03\x04")


ODD_BUT_READABLE = {
    "private elements": private,
    "odd length text": change(PatientComments=b"abc", SeriesDescription=b"odd", BodyPartExamined=b"CHEST"),
    "odd length numbers": change(SliceThickness=b"2.5", KVP=b"120", RescaleSlope=b"1.0", InstanceNumber=b"7"),
    "unknown VR for geometry": both(
        lambda dataset, index: put(dataset, "ImagePositionPatient", _ds(dataset.ImagePositionPatient), "UN"),
        lambda dataset, index: put(dataset, "ImageOrientationPatient", _ds([1, 0, 0, 0, 1, 0]), "UN"),
        lambda dataset, index: put(dataset, "PixelSpacing", _ds(dataset.PixelSpacing), "UN"),
    ),
    "unknown VR for rescale": change(vr="UN", RescaleSlope=b"1 ", RescaleIntercept=b"-1024 "),
    "text VR for rescale": change(vr="LO", RescaleSlope=b"1 ", RescaleIntercept=b"-1024 "),
    "unknown VR for matrix": change(vr="UN", Rows=b"\x14\0", Columns=b"\x18\0", BitsStored=b"\x0c\0"),
    "a text where a number should be": change(XRayTubeCurrent=b"high", KVP=b"n/a ", ExposureTime=b"?"),
    "a broken date": change(StudyDate=b"99999999", PatientBirthDate=b"unknown "),
    "a broken age": change(PatientAge=b"old "),
    "a uid with leading zeros": change(FrameOfReferenceUID="1.2.003.04"),
    "a padded uid": change(StudyInstanceUID=b"1.2.3.4\0", SeriesInstanceUID=b"1.2.3.5 "),
    "an overlay": lambda dataset, index: dataset.add_new(0x60003000, "OW", bytes(60)),
    "too many decimals": change(RescaleIntercept=b"-1024.00000000000000000000"),
}  # fmt: skip


def _ds(values):
    text = "\\".join(str(value) for value in values).encode()
    return text + b" " * (len(text) % 2)


@pytest.mark.parametrize("name", ODD_BUT_READABLE)
def test_odd_headers_that_can_be_read_are_read(tmp_path, name):
    Ct(damage=ODD_BUT_READABLE[name]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


WRONG_VR = {
    "rows as text": change(vr="LO", Rows=b"20"),
    "rows as signed": change(vr="SS", Rows=20),
    "rows as long": change(vr="UL", Rows=20),
    "rows as float": change(vr="FL", Rows=20.0),
    "position as floats": lambda d, i: put(d, "ImagePositionPatient", [float(v) for v in d.ImagePositionPatient], "FD"),
    "slope as float": change(vr="FD", RescaleSlope=1.0),
    "bits as text": change(vr="IS", BitsStored=b"12"),
    "pixels as text": lambda d, i: setattr(d["PixelData"], "VR", "UN"),
}


@pytest.mark.parametrize("name", WRONG_VR)
def test_a_needed_tag_under_a_wrong_vr_is_read_or_refused(tmp_path, name):
    Ct(damage=WRONG_VR[name]).write(tmp_path)
    codes = (C.TAG_INVALID, C.ORIENTATION_INVALID, C.RESCALE_INVALID, C.PIXELREP_CONFLICT, C.PIXEL_TRUNCATED)
    assert_never_silently_wrong(tmp_path, right(Ct()), refused(codes))


NEEDED = "Rows Columns PixelSpacing SOPInstanceUID SeriesInstanceUID SOPClassUID BitsStored PixelRepresentation".split()


@pytest.mark.parametrize("keyword", NEEDED)
def test_a_series_without_a_needed_tag_is_refused(tmp_path, keyword):
    Ct(damage=change(**{keyword: None})).write(tmp_path)
    bits = keyword in ("BitsStored", "PixelRepresentation")
    outcomes = [refused((C.TAG_INVALID, C.PIXELREP_CONFLICT) if bits else C.TAG_INVALID)]
    if keyword == "SOPClassUID":  # the file meta information says it too
        outcomes.append(right(Ct()))
    assert_never_silently_wrong(tmp_path, *outcomes)


def test_a_study_uid_may_be_absent_or_is_refused(tmp_path):
    Ct(damage=change(StudyInstanceUID=None)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()), refused((C.TAG_INVALID, C.UNSAFE_NAME)))


# ---- bombs, absurd sizes, nesting -----------------------------------------------------------------------------------


def deflate_bomb(plain_head: bytes, zeros: int) -> bytes:
    """A raw deflate stream of the head and that many zero bytes, made by repeating one compressed megabyte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(plain_head) + packer.flush(zlib.Z_FULL_FLUSH)
    megabyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + megabyte * (zeros >> 20) + packer.flush(zlib.Z_FINISH)


def explicit(group, element, vr, value, length=None):
    """One element, explicit VR little endian; `length` may lie."""
    length = len(value) if length is None else length
    head = struct.pack("<HH", group, element) + vr
    if vr in (b"OB", b"OW", b"UN", b"SQ"):
        return head + struct.pack("<HI", 0, length) + value
    return head + struct.pack("<H", length) + value


@pytest.mark.parametrize("inside", ["header", "pixels"])
def test_a_deflate_bomb_is_refused_and_its_neighbours_are_read(tmp_path, inside):
    ct = Ct(transfer_syntax=DeflatedExplicitVRLittleEndian)
    ct.write(tmp_path)
    (path,) = ct.but(uid=2).write(tmp_path, "bomb{}", only=[0])
    raw = path.read_bytes()
    meta_end = 144 + int.from_bytes(raw[140:144], "little")
    head = zlib.decompress(raw[meta_end:], -15)
    head = head[: head.index(b"\xe0\x7f\x10\0")]
    zeros = 2 << 30
    if inside == "header":
        cut = head.index(b"\x10\0\x10\0")  # before the patient's name
        head = head[:cut] + explicit(0x0009, 0x1010, b"OB", b"", zeros)
    else:
        head += explicit(0x7FE0, 0x0010, b"OW", b"", zeros)
    path.write_bytes(raw[:meta_end] + deflate_bomb(head, zeros))
    assert path.stat().st_size < 4 << 20
    # pixels may also be refused by their length alone, before any is inflated
    codes = (C.RESOURCE_LIMIT, C.PIXEL_TRUNCATED) if inside == "pixels" else C.RESOURCE_LIMIT
    assert_never_silently_wrong(tmp_path, right(ct, aside={codes: 1}))


@pytest.mark.parametrize("side", [20_000, 65_535])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_absurd_dimensions_are_refused(tmp_path, syntax, side):
    Ct().write(tmp_path)
    ct = Ct(uid=2, transfer_syntax=syntax, damage=change(Rows=side, Columns=side))
    ct.write(tmp_path, "bomb{}", only=[0])
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.RESOURCE_LIMIT: 1}))


def test_an_rle_bomb_is_refused(tmp_path):
    """8 KB of run lengths that say 400 million pixels."""
    run = b"\x81\0" * 2000
    segments = struct.pack("<16I", 2, 64, 64 + len(run), *[0] * 13) + run + run

    def bomb(dataset, index):
        dataset.Rows = dataset.Columns = 20_000
        dataset.PixelData = encapsulate([segments])
        dataset["PixelData"].is_undefined_length = True

    Ct().write(tmp_path)
    (path,) = Ct(uid=2, transfer_syntax=RLELossless, damage=bomb).write(tmp_path, "bomb{}", only=[0])
    assert path.stat().st_size < 10_000
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.RESOURCE_LIMIT: 1}))


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (25, 20), (1, 1)])
def test_a_codestream_that_lies_about_its_size_is_refused(tmp_path, width, height):
    def lie(dataset, index):
        if index == 4:
            (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
            code = bytearray(frame)
            assert struct.unpack_from(">II", code, SIZ_WIDTH) == (24, 20)
            struct.pack_into(">I", code, SIZ_WIDTH, width)
            struct.pack_into(">I", code, SIZ_HEIGHT, height)
            dataset.PixelData = encapsulate([bytes(code)])
            dataset["PixelData"].is_undefined_length = True

    Ct(transfer_syntax=JPEG2000Lossless, damage=lie).write(tmp_path)
    codes = (C.PIXEL_TRUNCATED, C.RESOURCE_LIMIT, C.DEADLINE, C.WORKER_DIED)
    assert_never_silently_wrong(tmp_path, refused(codes))


@pytest.mark.parametrize("length", [0xFFFFFFF0, 1 << 30, 1 << 20])
def test_an_element_longer_than_its_file_is_refused(tmp_path, length):
    paths = Ct().write(tmp_path)
    raw = paths[4].read_bytes()
    at = raw.index(b"\x10\0\x10\0PN")
    paths[4].write_bytes(raw[:at] + explicit(0x0009, 0x1010, b"OB", b"", length) + raw[at:])
    codes = (C.TAG_INVALID, C.PIXEL_TRUNCATED, C.RESOURCE_LIMIT)
    alone = Expected(aside={C.SLICE_MISSING: SLICES - 1, codes: 1})
    assert_never_silently_wrong(tmp_path, refused(codes), alone)


def nested(depth, *, defined_length):
    """A private sequence in a sequence in a sequence..."""
    if not defined_length:
        inward = (explicit(0x0009, 0x1010, b"SQ", b"", 0xFFFFFFFF) + b"\xfe\xff\0\xe0\xff\xff\xff\xff") * depth
        outward = (b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0") * depth
        return inward + outward
    value = b""
    for _ in range(depth):
        value = explicit(0x0009, 0x1010, b"SQ", b"\xfe\xff\0\xe0" + struct.pack("<I", len(value)) + value)
    return value


def insert_nested(path, depth, *, defined_length=False):
    raw = path.read_bytes()
    at = raw.index(b"\x10\0\x10\0PN")
    path.write_bytes(raw[:at] + nested(depth, defined_length=defined_length) + raw[at:])


@pytest.mark.parametrize("defined_length", [False, True], ids=["undefined length", "defined length"])
@pytest.mark.parametrize("depth", [100, 1000, 5000])
def test_sequences_nested_too_deeply_cost_no_more_than_their_series(tmp_path, depth, defined_length):
    good = Ct(uid=2)
    good.write(tmp_path, "good{}")
    for path in Ct().write(tmp_path):
        insert_nested(path, depth, defined_length=defined_length)
    outcomes = [right(good, aside={C.NESTING: SLICES})]
    if defined_length:  # one may step over it without looking inside
        outcomes.append(Expected((Truth(good.grid), Truth(good.grid))))
    assert_never_silently_wrong(tmp_path, *outcomes)


@pytest.mark.parametrize("depth", [1, 10, 50])
def test_sequences_nested_as_real_ones_are_read(tmp_path, depth):
    for path in Ct().write(tmp_path):
        insert_nested(path, depth)
    assert_never_silently_wrong(tmp_path, right(Ct()))


# ---- names ----------------------------------------------------------------------------------------------------------

UNSAFE = {
    "up and away": b"../../etc/x",
    "up in the middle": b"1.2/../../3 ",
    "absolute": b"/etc/passwd ",
    "NUL inside": b"1.2\0.3",
    "backslash": b"1.2\\3.4 ",
    "65 characters": b"1." + b"2" * 63 + b"\0",
    "300 characters": b"1." + b"2" * 298,
    "letters": b"CT-series-7 ",
    "newline": b"1.2\n.3",
    "spaces inside": b"1.2 .3",
    "formula": b"=1+2",
    "not ASCII": "1.2.３".encode(),
}


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
@pytest.mark.parametrize("name", UNSAFE)
def test_a_uid_that_is_none_is_rejected(tmp_path, keyword, name):
    """Names of results are made of them (CVE-2026-56445)."""
    good = Ct(uid=2)
    good.write(tmp_path, "good{}")
    Ct(damage=change(**{keyword: UNSAFE[name]})).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(good, aside={C.UNSAFE_NAME: SLICES}))


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_an_empty_uid_is_refused(tmp_path, keyword):
    Ct(damage=change(**{keyword: b""})).write(tmp_path)
    both_ways = [refused((C.TAG_INVALID, C.UNSAFE_NAME))]
    if keyword == "StudyInstanceUID":
        both_ways.append(right(Ct()))
    assert_never_silently_wrong(tmp_path, *both_ways)


@pytest.mark.parametrize("uid", ["1." + "2" * 62, "2.25." + "9" * 39, "1.2.3"])
def test_any_legal_uid_is_read(tmp_path, uid):
    Ct(damage=change(SeriesInstanceUID=uid)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


NAMES = ["=cmd{}.dcm", "Müller {}.dcm", "a\nb{}", "\u202e{}.mcd", "{}" + "x" * 200, " {} ", "-rf {}"]


@pytest.mark.parametrize("name", NAMES)
def test_file_names_mean_nothing(tmp_path, name):
    Ct().write(tmp_path, name)
    assert_never_silently_wrong(tmp_path, right(Ct()))


def test_a_file_name_that_is_no_text_is_read(tmp_path):
    for index, path in enumerate(Ct().write(tmp_path)):
        path.rename(tmp_path / os.fsdecode(b"\xff\xfe%d" % index))
    assert_never_silently_wrong(tmp_path, right(Ct()))


# ---- what is no regular file ----------------------------------------------------------------------------------------

ODDITIES = {
    "link to a file": lambda folder, outside: (folder / "odd").symlink_to(outside / "IM0000.dcm"),
    "link to a folder": lambda folder, outside: (folder / "odd").symlink_to(outside),
    "link to nothing": lambda folder, outside: (folder / "odd").symlink_to(folder / "nothing"),
    "link to itself": lambda folder, outside: (folder / "odd").symlink_to(folder / "odd"),
    "loop of folders": lambda folder, outside: (folder / "odd").symlink_to(folder),
    "link to a device": lambda folder, outside: (folder / "odd").symlink_to("/dev/zero"),
    "pipe": lambda folder, outside: os.mkfifo(folder / "odd"),
    "socket": lambda folder, outside: os.mknod(folder / "odd", stat.S_IFSOCK | 0o600),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path, name):
    Ct(uid=2).write(tmp_path / "outside")
    Ct().write(tmp_path / "ct")
    ODDITIES[name](tmp_path / "ct", tmp_path / "outside")
    assert_never_silently_wrong(tmp_path / "ct", right(Ct(), aside={C.NOT_REGULAR: 1}))


def test_hard_links_are_copies(tmp_path):
    path = Ct().write(tmp_path)[3]
    os.link(path, tmp_path / "again")
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.DUP_IDENTICAL: 1}))


@pytest.mark.parametrize("name", ["numpy.py", "pydicom.py", "medvit.py", "json.py"])
def test_code_that_lies_in_the_working_folder_is_never_run(tmp_path, name):
    """Whoever runs a command inside a downloaded folder must not run what was downloaded, in no process."""
    Ct().write(tmp_path / "ct")
    (tmp_path / name).write_text("from pathlib import Path\nPath('ran').touch()\nraise SystemExit(1)\n")
    program = "import sys; from medvit.io import read; print(read(sys.argv[1]).hu.shape)"
    source = str(Path(medvit.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-P", "-c", program, "ct"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not (tmp_path / "ran").exists()
    assert run.stdout.strip() == "(12, 20, 24)", run.stderr[-500:]


# ---- archives -------------------------------------------------------------------------------------------------------


def zipped(raw):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("IM0000.dcm", raw)
    return stream.getvalue()


def tarred(raw):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("IM0000.dcm")
        member.size = len(raw)
        archive.addfile(member, io.BytesIO(raw))
    return stream.getvalue()


ARCHIVES = {
    "zip": zipped,
    "empty zip": lambda raw: b"PK\5\6" + bytes(18),
    "tar": tarred,
    "gzip": gzip.compress,
    "tar.gz": lambda raw: gzip.compress(tarred(raw)),
    "7z": lambda raw: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(200),
    "rar 4": lambda raw: b"Rar!\x1a\x07\x00" + bytes(200),
    "rar 5": lambda raw: b"Rar!\x1a\x07\x01\x00" + bytes(200),
}


@pytest.mark.parametrize("suffix", [".dcm", ".zip", "", ".gz"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_are_named_and_not_opened(tmp_path, kind, suffix):
    raw = Ct(uid=2).write(tmp_path / "inside", only=[0])[0].read_bytes()
    Ct().write(tmp_path / "ct")
    (tmp_path / "ct" / f"export{suffix}").write_bytes(ARCHIVES[kind](raw))
    assert_never_silently_wrong(
        tmp_path / "ct",
        right(Ct(), aside={(C.ARCHIVE_LIMIT, C.NOT_DICOM) if kind == "empty zip" else C.ARCHIVE_LIMIT: 1}),
    )


# ---- files that change ----------------------------------------------------------------------------------------------


def grow(path):
    with path.open("ab") as stream:
        stream.write(bytes(100))


def shrink(path):
    path.write_bytes(path.read_bytes()[:-100])


def replace_content(path):
    """Another patient's slice of the same size, a second later."""
    later = path.stat().st_mtime_ns + 10**9
    raw = path.read_bytes()
    path.write_bytes(raw[:-960] + bytes(960))
    os.utime(path, ns=(later, later))


def vanish(path):
    path.unlink()


def become_a_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def become_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("happens", [grow, shrink, replace_content], ids=lambda happens: happens.__name__)
@pytest.mark.parametrize("objects", ["slices", "frames"])
def test_a_file_that_changes_after_listing_is_incomplete(tmp_path, happens, objects):
    path = Ct().write(tmp_path)[5] if objects == "slices" else EnhancedCt().write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    happens(path)
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code is C.INCOMPLETE


@pytest.mark.parametrize("happens", [vanish, become_a_link, become_a_pipe], ids=lambda happens: happens.__name__)
def test_a_file_that_is_gone_after_listing_is_named(tmp_path, happens):
    path = Ct().write(tmp_path / "ct")[5]
    (series,) = scan_folder(tmp_path / "ct").series
    happens(path)
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code in (C.INCOMPLETE, C.IO_ERROR, C.NOT_REGULAR)


def test_other_series_are_read_while_one_changes(tmp_path):
    path = Ct().write(tmp_path, "a{}")[5]
    Ct(uid=2, grid=GRIDS["oblique"]).write(tmp_path, "b{}")
    one, two = sorted(scan_folder(tmp_path).series, key=lambda series: series.uid)
    grow(path)
    with pytest.raises(ScanError):
        read(one)
    assert read(two).hu.shape == phantom_hu().shape


def test_a_second_listing_sees_what_has_arrived(tmp_path):
    Ct().write(tmp_path, only=range(6))
    half = Expected((Truth(GRIDS["axial"], phantom_hu()[:6]),))
    assert_never_silently_wrong(tmp_path, half)
    Ct().write(tmp_path, only=range(6, 12))
    assert_never_silently_wrong(tmp_path, right(Ct()))
