"""From stored values to Hounsfield units: rescale, units, padding, sign and bit depth, plausibility."""

import warnings

import numpy as np
import pytest
from ct_builder import Ct, both, change, jpeg_2000, phantom_hu, put
from hazard_cases import GEOMETRIES, C, assert_never_silently_wrong, ct_on, refused, right
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from medvit.io import read, scan_folder
from medvit.records import AIR_HU, ScanError

# ---- rescale --------------------------------------------------------------------------------------------------------

ABSENT = {"RescaleSlope": None}, {"RescaleIntercept": None}, {"RescaleSlope": None, "RescaleIntercept": None}
INVALID = [
    {"RescaleSlope": 0},
    {"RescaleSlope": b"0.0 "},
    {"RescaleSlope": -1},
    {"RescaleSlope": b"NaN "},
    {"RescaleSlope": b"inf "},
    {"RescaleSlope": b"one "},
    {"RescaleSlope": b"1,5 "},
    {"RescaleSlope": b"1\\2 "},
    {"RescaleIntercept": b"NaN "},
    {"RescaleIntercept": b"none"},
    {"RescaleIntercept": b"-inf"},
]


@pytest.mark.parametrize("at", [None, 4], ids=["all slices", "one slice"])
@pytest.mark.parametrize("tags", ABSENT, ids=str)
def test_rescale_is_never_guessed(tmp_path, tags, at):
    Ct(damage=change(at, **tags)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.RESCALE_MISSING))


@pytest.mark.parametrize("at", [None, 0], ids=["all slices", "first slice"])
@pytest.mark.parametrize("tags", INVALID, ids=str)
def test_a_rescale_that_is_no_scale_is_refused(tmp_path, tags, at):
    Ct(damage=change(at, **tags)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.RESCALE_INVALID))


@pytest.mark.parametrize("tags", [{"RescaleSlope": b""}, {"RescaleIntercept": b""}], ids=str)
def test_an_empty_rescale_is_absent_or_invalid(tmp_path, tags):
    Ct(damage=change(**tags)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused((C.RESCALE_MISSING, C.RESCALE_INVALID)))


@pytest.mark.parametrize("text", [b"1 ", b" 1", b"+1", b"1.0E0 ", b"1\0", b"001.000000000000"])
def test_any_legal_spelling_of_a_number_is_read(tmp_path, text):
    Ct(damage=change(RescaleSlope=text)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("slopes", [(1.0, 0.5, 0.25), (0.25, 1.0), (0.1,)])
def test_each_slice_has_its_own_slope(tmp_path, geometry, slopes):
    ct = ct_on(geometry, JPEGLSLossless, slopes=slopes, bits_stored=16)
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


@pytest.mark.parametrize("units", ["US", "OD", "Z_EFF", "ED", "HU_MOD", "PCT", "MGML"])
def test_other_units_are_no_hounsfield_units(tmp_path, units):
    Ct(damage=change(RescaleType=units)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.RESCALE_UNITS))


@pytest.mark.parametrize("units", [None, "", "HU", "HU "])
def test_absent_units_are_hounsfield_units(tmp_path, units):
    """PS3.3 C.8.2.1: for CT the output is HU unless RescaleType says otherwise."""
    Ct(damage=change(RescaleType=units)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


def modality_lut(kind):
    """Stored value -> HU by a table that says what the rescale tags would have said."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("ModalityLUTType", "LO", kind)
    item.add_new("LUTData", "OW", np.clip(np.arange(4096) - 1024, 0, None).astype("<u2").tobytes())
    return lambda dataset, index: setattr(dataset, "ModalityLUTSequence", [item])


@pytest.mark.parametrize("kind", ["HU", "US", "OD"])
@pytest.mark.parametrize("rescale", ["beside the table", "absent"])
def test_a_modality_table_is_never_ignored(tmp_path, kind, rescale):
    """A table of unsigned entries cannot hold air: nobody can say what it means beside a rescale."""
    without = change(RescaleSlope=None, RescaleIntercept=None, RescaleType=None)
    edits = (modality_lut(kind), without) if rescale == "absent" else (modality_lut(kind),)
    Ct(damage=both(*edits)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.RESCALE_UNITS))


# ---- padding --------------------------------------------------------------------------------------------------------


def padded(stored, *, signed=True, bits_stored=16, intercept=-1024.0, **tags):
    """A series whose first corner holds these stored values, and the HU that must come out."""
    outside, filled = phantom_hu(), phantom_hu()
    stored = np.resize(stored, (12, 4, 5))
    outside[:, :4, :5], filled[:, :4, :5] = stored + intercept, AIR_HU
    ct = Ct(hu=outside, signed=signed, bits_stored=bits_stored, intercept=intercept)
    return ct.but(damage=lambda dataset, index: [put(dataset, k, v[1], v[0]) for k, v in tags.items()]), filled


PADDINGS = {
    "SS in signed pixels": padded([-2000], PixelPaddingValue=("SS", -2000)),
    "US that means -2000": padded([-2000], PixelPaddingValue=("US", 63536)),
    "US in unsigned pixels": padded([63536], signed=False, PixelPaddingValue=("US", 63536)),
    "SS that means 63536": padded([63536], signed=False, PixelPaddingValue=("SS", -2000)),
    "SS below 12 bits": padded([-2000], bits_stored=12, intercept=0.0, PixelPaddingValue=("SS", -2000)),
    "the lowest of 16 bits": padded([-32768], PixelPaddingValue=("SS", -32768)),
    "a range": padded([-2000, -1950, -1900], PixelPaddingValue=("SS", -2000), PixelPaddingRangeLimit=("SS", -1900)),
    "a range, largest first": padded(
        [-2000, -1950, -1900], PixelPaddingValue=("SS", -1900), PixelPaddingRangeLimit=("SS", -2000)
    ),
    "a range in US": padded([-2000, -1950], PixelPaddingValue=("US", 63536), PixelPaddingRangeLimit=("US", 63636)),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_is_air_and_nothing_else_is(tmp_path, name):
    ct, filled = PADDINGS[name]
    ct.write(tmp_path)
    (scan,) = assert_never_silently_wrong(tmp_path, right(ct, C.PADDING_APPLIED, hu=filled))
    assert scan.padding_fraction == pytest.approx(20 / 480)


@pytest.mark.parametrize("ends", [(0, 900), (900, 0), (0, 4095)], ids=str)
def test_a_range_of_padding_that_reaches_into_the_body_is_refused(tmp_path, ends):
    """Stored 0 is -1024 HU and a good padding value, 900 is -124 HU: fat and lung would come out as air."""
    value, limit = (end.to_bytes(2, "little") for end in ends)
    Ct(damage=change(vr="US", PixelPaddingValue=value, PixelPaddingRangeLimit=limit)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.PIXELREP_CONFLICT))


@pytest.mark.parametrize("value", [("US", b""), ("LO", b"none"), ("LO", b"1.5 ")], ids=str)
def test_unreadable_padding_is_refused_or_no_padding(tmp_path, value):
    vr, raw = value
    Ct(damage=change(vr=vr, PixelPaddingValue=raw)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()), refused(C.TAG_INVALID))


# ---- sign and bit depth ---------------------------------------------------------------------------------------------

CONTAINERS = [
    # bits stored, signed, intercept, HU range that fits
    (12, False, -1024.0, (-1024, 3071)),
    (12, True, 0.0, (-2048, 2047)),
    (12, True, -1024.0, (-1024, 1023)),
    (13, True, 0.0, (-1024, 4095)),
    (14, False, -8192.0, (-1024, 8191)),
    (16, False, -1024.0, (-1024, 15000)),
    (16, True, 0.0, (-1024, 15000)),
]


def ramp(low, high):
    return np.linspace(low, high, 3 * 20 * 24).round().astype(int).reshape(3, 20, 24)


@pytest.mark.parametrize("container", CONTAINERS, ids=str)
@pytest.mark.parametrize("upper_bits", ["zero", "sign", "shifted up"])
def test_stored_values_in_any_container(tmp_path, container, upper_bits):
    """Above the stored bits lie zeros, or copies of the sign, or (older scanners) nothing: HighBit 15."""
    bits, signed, intercept, hu_range = container

    def repack(dataset, index):
        values = np.frombuffer(dataset.PixelData, "<u2")
        if upper_bits == "zero":
            values = values & ((1 << bits) - 1)
        elif upper_bits == "shifted up":
            values, dataset.HighBit = (values & ((1 << bits) - 1)) << (16 - bits), 15
        dataset.PixelData = values.astype("<u2").tobytes()

    ct = Ct(hu=ramp(*hu_range), bits_stored=bits, signed=signed, intercept=intercept, edit=repack)
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


@pytest.mark.parametrize("tags", [{"BitsStored": 17}, {"BitsStored": 0}, {"HighBit": 16}, {"HighBit": 3}], ids=str)
def test_impossible_bit_depth_is_refused(tmp_path, tags):
    Ct(damage=change(**tags)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.PIXELREP_CONFLICT))


@pytest.mark.parametrize("tags", [{"BitsAllocated": None}, {"BitsAllocated": 12}, {"BitsAllocated": 0}], ids=str)
def test_impossible_container_is_refused(tmp_path, tags):
    Ct(damage=change(**tags)).write(tmp_path)
    assert_never_silently_wrong(
        tmp_path, refused((C.PIXELREP_CONFLICT, C.TAG_INVALID, C.PIXEL_TRUNCATED, C.RESOURCE_LIMIT))
    )


def test_values_above_their_bit_depth_are_refused(tmp_path):
    """Values up to 5000 declared as 12 bits: cutting them to 12 would turn bone into air."""
    Ct(hu=ramp(-1024, 4000), bits_stored=16, damage=change(BitsStored=12, HighBit=11)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.PIXELREP_CONFLICT, 3))


def test_a_sign_that_differs_between_slices_is_no_fault(tmp_path):
    """Each slice is read as it says itself, not as the first one does."""

    def signed_later(dataset, index):
        if index > 5:
            shifted = np.frombuffer(dataset.PixelData, "<u2").astype(int) - 1024
            dataset.PixelData, dataset.PixelRepresentation = (shifted & 0xFFFF).astype("<u2").tobytes(), 1
            dataset.RescaleIntercept = 0

    ct = Ct(bits_stored=16, edit=signed_later)
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


def test_jpeg_2000_whose_sign_contradicts_the_header(tmp_path):
    """A slice of a real scanner: unsigned by its header's word, signed in its codestream, or the other way round."""
    path = get_testdata_file("J2K_pixelrep_mismatch.dcm")
    dataset = dcmread(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = pixel_array(dataset)  # pydicom corrects the sign by the header
    expected = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    assert expected.min() < -900  # air: the correction makes sense
    try:
        scan = read(path)
    except ScanError as error:
        code = error.code
    else:
        code = None
        inside = scan.hu[0] != AIR_HU  # what is not padding
        np.testing.assert_array_equal(scan.hu[0][inside], expected[inside])
    assert code in (None, C.PIXELREP_CONFLICT)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [12, 13, 16])
def test_jpeg_2000_of_the_other_sign_is_right_or_refused(tmp_path, signed, bits):
    """The codestream says the opposite of the header; the bits are the header's."""

    def other_sign(dataset, index):
        plane = np.frombuffer(Ct(signed=signed, bits_stored=bits).dataset(index).PixelData, "<u2").reshape(20, 24)
        dataset.PixelData = encapsulate([jpeg_2000(plane, dataset, signed=not signed)])
        dataset["PixelData"].is_undefined_length = True

    ct = Ct(signed=signed, bits_stored=bits, transfer_syntax=JPEG2000Lossless, damage=other_sign)
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct, may={C.PIXELREP_CONFLICT}), refused(C.PIXELREP_CONFLICT))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2 ", "monochrome2"])
def test_display_never_changes_values(tmp_path, photometric):
    shown = change(
        PhotometricInterpretation=photometric,
        PresentationLUTShape="INVERSE",
        WindowCenter=40,
        WindowWidth=400,
        RescaleType="HU",
    )
    Ct(damage=shown).write(tmp_path)
    codes = (C.MONO1,) if "1" in photometric else ()
    assert_never_silently_wrong(tmp_path, right(Ct(), *codes), refused(C.PHOTOMETRIC))


# ---- plausibility ---------------------------------------------------------------------------------------------------


def body(air=-1000.0, tissue=40.0):
    """Two thirds air, one third soft tissue with some bone, in 12 slices of 20 x 24."""
    random = np.random.default_rng(7)
    hu = random.normal(air, 8, (12, 20, 24))
    hu[:, 4:16, 5:19] = random.normal(tissue, 12, (12, 12, 14))
    hu[:, 14:16, 10:14] = tissue + 700
    return hu.round()


IMPLAUSIBLE = {
    "constant": np.full((12, 20, 24), -500.0),
    "constant air": np.full((12, 20, 24), -1024.0),
    "wider than any scanner": np.where(body() > 600, 25_000.0, body()),
    "not rescaled": body() + 1024,
    "not rescaled, padding outside": np.maximum(body() + 1024, 0),
    "rescaled twice": body() - 1024,
    "not rescaled by 8192": body() + 8192,
    "rescaled twice by 8192": body() - 8192,
    "not rescaled by 8192, round picture": np.where(body() < -1010, -1024.0, body() + 8192),
}
PLAUSIBLE = {
    "body in air": body(),
    "no air at all": body()[:, 5:13, 6:18],
    "only water": np.random.default_rng(1).normal(0, 5, (12, 20, 24)).round(),
    "only lung": np.random.default_rng(1).normal(-850, 40, (12, 20, 24)).round(),
    "brain window": np.clip(body(), -20, 100),
    "metal": np.where(body() > 600, 14_000.0, body()),
    "margin of -2000": np.where(np.indices((12, 20, 24))[2] < 8, -2000.0, body()),
    "implant fills the view": np.random.default_rng(1).normal(2500, 300, (12, 20, 24)).round(),
}


def of_values(hu):
    return Ct(hu=hu, signed=True, bits_stored=16, intercept=0.0)


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_values_that_no_body_has_are_refused(tmp_path, name):
    of_values(IMPLAUSIBLE[name]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.HU_IMPLAUSIBLE))


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_unusual_bodies_are_no_fault(tmp_path, name):
    ct = of_values(PLAUSIBLE[name])
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


def test_assumed_hu_are_flagged_and_checked(tmp_path):
    without = change(RescaleSlope=None, RescaleIntercept=None)
    of_values(body()).but(edit=without).write(tmp_path / "hu")
    (series,) = scan_folder(tmp_path / "hu", assume_hu=True).series
    assert C.RESCALE_MISSING in read(series).codes
    np.testing.assert_array_equal(read(series).hu, body())
    of_values(body() + 1024).but(edit=without).write(tmp_path / "stored")
    (series,) = scan_folder(tmp_path / "stored", assume_hu=True).series
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code in (C.RESCALE_MISSING, C.HU_IMPLAUSIBLE)
