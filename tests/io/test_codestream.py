"""A compressed frame and its header must say the same; where they do not, no pixel of it is believed."""

import numpy as np
import pytest
from ct_builder import Ct

from medvit.io import read, scan_folder
from medvit.io.codestream import describe
from medvit.records import ReasonCode, ScanError

JPEG_LS, JPEG_2000, RLE = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
NOISE = np.random.default_rng(0).integers(-1000, 3000, (3, 40, 48))


def edited(**tags):
    def edit(dataset, index):
        for name, value in tags.items():
            setattr(dataset, name, value)

    return edit


def read_with(folder, syntax, **tags):
    """A series whose header is changed after its frames were encoded."""
    paths = Ct(hu=NOISE, transfer_syntax=syntax, intercept=-1024).write(folder)
    from pydicom import dcmread  # noqa: PLC0415

    for path in paths:
        dataset = dcmread(path)
        for name, value in tags.items():
            setattr(dataset, name, value)
        dataset.save_as(path)
    (series,) = scan_folder(folder).series
    return read(series)


@pytest.mark.parametrize("syntax", [JPEG_LS, JPEG_2000])
@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"Rows": 48, "Columns": 40}, ReasonCode.PIXEL_TRUNCATED),
        ({"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15}, ReasonCode.PIXELREP_CONFLICT),
        ({"BitsStored": 10, "HighBit": 9}, ReasonCode.PIXELREP_CONFLICT),
        ({"HighBit": 15}, ReasonCode.PIXELREP_CONFLICT),
    ],
    ids=["turned", "signed", "fewer bits", "high bit"],
)
def test_a_header_that_contradicts_its_frame_is_refused(tmp_path, syntax, tags, code):
    with pytest.raises(ScanError) as caught:
        read_with(tmp_path, syntax, **tags)
    assert caught.value.code is code


@pytest.mark.parametrize("syntax", [JPEG_LS, JPEG_2000])
def test_a_frame_that_agrees_is_read(tmp_path, syntax):
    np.testing.assert_array_equal(read_with(tmp_path, syntax).hu, NOISE)


@pytest.mark.parametrize("lost", range(1, 12))
@pytest.mark.parametrize("syntax", [JPEG_LS, JPEG_2000, RLE])
def test_fragments_that_lost_bytes_do_not_swallow_what_follows(tmp_path, syntax, lost):
    (path,) = Ct(hu=NOISE[:1], transfer_syntax=syntax).write(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw[: -8 - lost] + raw[-8:])
    with pytest.raises(ScanError) as caught:
        read(path)
    assert caught.value.code is ReasonCode.PIXEL_TRUNCATED


def test_pixel_data_twice_is_refused(tmp_path):
    (path,) = Ct(hu=NOISE[:1]).write(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw + raw[raw.rindex(b"\xe0\x7f\x10\x00") :])
    with pytest.raises(ScanError, match="twice"):
        read(path)


def test_an_overlay_of_its_own_excuses_no_bits_in_the_pixels(tmp_path):
    def stray_bits(position):
        def edit(dataset, index):
            stored = np.frombuffer(dataset.PixelData, "<u2").copy()
            stored[::3] |= 0x8000
            dataset.PixelData = stored.tobytes()
            dataset.add_new(0x60000102, "US", position)

        return edit

    Ct(edit=stray_bits(0)).write(tmp_path / "apart")
    with pytest.raises(ScanError) as caught:
        read(tmp_path / "apart")
    assert caught.value.code is ReasonCode.PIXELREP_CONFLICT
    Ct(edit=stray_bits(15)).write(tmp_path / "within")
    assert read(tmp_path / "within").hu.shape == (12, 20, 24)


@pytest.mark.parametrize("value", [63536, 65535])
def test_padding_that_the_stored_bits_cannot_hold_masks_nothing(tmp_path, value):
    """Cut down to 12 bits, 63536 would be 2096: bone at 1072 HU."""

    def pad(dataset, index):
        dataset.add_new("PixelPaddingValue", "US", value)

    hu = NOISE.copy()
    hu[:, 3:6] = 1072
    hu[:, 8] = 3071
    Ct(hu=hu, edit=pad).write(tmp_path)
    np.testing.assert_array_equal(read(tmp_path).hu, hu)


def test_nothing_is_made_of_what_is_no_stream():
    assert describe(b"") is None
    assert describe(b"\xff\xd8\xff") is None
    assert describe(b"\xff\xd8" + b"\xff\xe0\x00\x04ab" * 3) is None
    assert describe(bytes(600)) is None
