"""read, from DICOM: Hounsfield units and geometry are right, whatever the encoding; SimpleITK is the second opinion."""

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from ct_builder import CT, GRIDS, Ct, assert_is_phantom, phantom_hu
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file

from medvit.io import read, scan_folder
from medvit.io.pixels import Layout, stored_values
from medvit.records import AIR_HU, Outcome, ReasonCode, ScanError


def by_sitk(paths):
    """HU (Z, Y, X) and LPS affine as SimpleITK reads the files in the order given."""
    image = sitk.ReadImage([str(path) for path in paths])
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


# ---- rescale, sign, bit depth ---------------------------------------------------------------------------------------


def test_each_slice_is_rescaled_by_its_own_slope(tmp_path):
    """Not by the first slice's: PET-like CT and some reconstructions change it."""
    Ct(slopes=(1.0, 0.5, 0.25), bits_stored=16).write(tmp_path)
    assert_is_phantom(read(tmp_path))


@pytest.mark.parametrize("positive", [0, 11])
def test_a_slice_without_negative_values_does_not_fix_the_type(tmp_path, positive):
    hu = phantom_hu()
    hu[positive] = 300 + np.arange(24)
    Ct(hu=hu, intercept=0, signed=True).write(tmp_path)
    np.testing.assert_array_equal(read(tmp_path).hu, hu)


@pytest.mark.parametrize(
    ("signed", "bits_stored", "intercept", "hu_range"),
    [
        (False, 12, -1024, (-1024, 3071)),
        (True, 12, 0, (-2048, 2047)),
        (True, 12, -1024, (-1024, 1023)),
        (False, 16, -1024, (-1024, 15000)),
        (True, 16, 0, (-1024, 15000)),
    ],
)
def test_sign_and_bit_depth(tmp_path, signed, bits_stored, intercept, hu_range):
    hu = np.linspace(*hu_range, 3 * 20 * 24).round().astype(int).reshape(3, 20, 24)
    Ct(hu=hu, signed=signed, bits_stored=bits_stored, intercept=intercept).write(tmp_path)
    np.testing.assert_array_equal(read(tmp_path).hu, hu)


def test_sign_is_extended_from_bits_stored_when_the_container_is_not(tmp_path):
    """Twelve signed bits with zeros above them: -1000 is stored as 0x0C18."""

    def masked(dataset, index):
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") & 0x0FFF).astype("<u2").tobytes()

    Ct(signed=True, intercept=0, edit=masked).write(tmp_path)
    assert_is_phantom(read(tmp_path))


def test_values_in_the_high_bits_of_the_container(tmp_path):
    """HighBit 15 with 12 bits stored: the values are shifted up by 4."""

    def shifted(dataset, index):
        dataset.HighBit = 15
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") << 4).astype("<u2").tobytes()

    Ct(edit=shifted).write(tmp_path)
    assert_is_phantom(read(tmp_path))


def test_bits_outside_bits_stored_are_a_conflict(tmp_path):
    def junk(dataset, index):
        if index == 5:
            stored = np.frombuffer(dataset.PixelData, "<u2").copy()
            stored[7] |= 0x4000
            dataset.PixelData = stored.tobytes()

    Ct(edit=junk).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    assert caught.value.code is ReasonCode.PIXELREP_CONFLICT


def test_an_old_overlay_in_the_unused_bits_is_no_conflict(tmp_path):
    def overlay(dataset, index):
        stored = np.frombuffer(dataset.PixelData, "<u2").copy()
        stored[::3] |= 0x1000
        dataset.PixelData = stored.tobytes()
        dataset.add_new(0x60000010, "US", 20)
        dataset.add_new(0x60000102, "US", 12)

    Ct(edit=overlay).write(tmp_path)
    assert_is_phantom(read(tmp_path))


@pytest.mark.parametrize("high_bit", [7, 30, None])
def test_impossible_high_bit_is_a_named_refusal_or_the_standard_reading(tmp_path, high_bit):
    Ct(edit=lambda dataset, index: setattr(dataset, "HighBit", high_bit)).write(tmp_path)
    if high_bit is None:
        assert_is_phantom(read(tmp_path))
        return
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    assert caught.value.code is ReasonCode.PIXELREP_CONFLICT


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 16),
    signed=st.booleans(),
    spare=st.integers(0, 14),
    extend=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_stored_values_come_back_from_any_container(bits, signed, spare, extend, seed):
    shift = min(spare, 16 - bits)
    low = -(1 << (bits - 1)) if signed else 0
    values = np.random.default_rng(seed).integers(low, low + (1 << bits), (4, 5))
    field = values if extend and signed else values & ((1 << bits) - 1)
    container = ((field << shift) & 0xFFFF).astype("<u2")
    layout = Layout("", 4, 5, 16, bits, bits + shift - 1, signed, None, overlays=False, photometric="", frames=1)
    raw = container.view("<i2" if signed else "<u2")
    np.testing.assert_array_equal(stored_values(raw, layout), values)


# ---- padding, photometric, lookup -----------------------------------------------------------------------------------


def padded(value, vr, *, stored_padding=-2000, limit=None):
    def edit(dataset, index):
        stored = np.frombuffer(dataset.PixelData, "<i2").copy()
        stored[:24] = stored_padding
        dataset.PixelData = stored.tobytes()
        dataset.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)

    return edit


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
@pytest.mark.parametrize(("value", "vr"), [(-2000, "SS"), (63536, "US")])
def test_padding_written_with_the_wrong_sign_is_still_padding(tmp_path, syntax, value, vr):
    """GE writes -2000 as US 63536; rescaled it would be -3024 HU, and a minimum filter away from a false finding."""
    ct = Ct(signed=True, bits_stored=16, intercept=-1024, hu=phantom_hu() + 0, transfer_syntax=syntax)
    ct.edit = padded(value, vr)
    ct.write(tmp_path)
    scan = read(tmp_path)
    assert scan.codes == (ReasonCode.PADDING_APPLIED,)
    assert scan.padding_fraction == pytest.approx(1 / 20)
    assert (scan.hu[:, 0] == AIR_HU).all()
    np.testing.assert_array_equal(scan.hu[:, 1:], phantom_hu()[:, 1:])


def test_padding_is_masked_on_stored_values_before_rescaling(tmp_path):
    """A stored 0 is padding; a stored 1024 is 0 HU and is not."""
    hu = phantom_hu()
    hu[:, 1] = 0
    Ct(hu=hu, edit=padded(0, "US", stored_padding=0)).write(tmp_path)
    scan = read(tmp_path)
    assert (scan.hu[:, 1] == 0).all()
    assert (scan.hu[:, 0] == AIR_HU).all()


def test_padding_range_covers_all_between(tmp_path):
    Ct(signed=True, bits_stored=16, edit=padded(-2000, "SS", stored_padding=-1990, limit=-1980)).write(tmp_path)
    assert (read(tmp_path).hu[:, 0] == AIR_HU).all()


def test_padding_value_that_no_pixel_has_changes_nothing(tmp_path):
    Ct(edit=lambda d, i: d.add_new("PixelPaddingValue", "US", 4000)).write(tmp_path)
    scan = read(tmp_path)
    assert_is_phantom(scan)
    assert (scan.codes, scan.padding_fraction) == ((), 0.0)


def test_monochrome1_is_display_only(tmp_path):
    Ct(edit=lambda d, i: setattr(d, "PhotometricInterpretation", "MONOCHROME1")).write(tmp_path)
    scan = read(tmp_path)
    assert_is_phantom(scan)
    assert scan.codes == (ReasonCode.MONO1,)


def test_display_window_never_touches_hu(tmp_path):
    def window(dataset, index):
        dataset.WindowCenter, dataset.WindowWidth = 40, 80

    Ct(edit=window).write(tmp_path)
    assert_is_phantom(read(tmp_path))


@pytest.mark.parametrize("hu", [np.full((3, 20, 24), -500), np.linspace(-1024, 30000, 1440).reshape(3, 20, 24)])
def test_what_cannot_be_ct_is_refused(tmp_path, hu):
    Ct(hu=hu, bits_stored=16).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    assert caught.value.code is ReasonCode.HU_IMPLAUSIBLE


def test_assumed_hu_must_show_air(tmp_path):
    """Stored values with an offset of 1024 are no HU: the lowest is 24."""
    Ct(edit=lambda d, i: [d.pop("RescaleSlope"), d.pop("RescaleIntercept")]).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        read(tmp_path, assume_hu=True)
    assert caught.value.code is ReasonCode.RESCALE_MISSING


# ---- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_orientation_agrees_with_the_phantom_and_with_simpleitk(tmp_path, name):
    grid = GRIDS[name]
    Ct(grid=grid).write(tmp_path)
    scan = read(tmp_path)
    assert_is_phantom(scan, grid)
    hu, affine = by_sitk(scan.files)
    np.testing.assert_allclose(scan.hu, hu, atol=1)
    np.testing.assert_allclose(scan.affine, affine, atol=0.01)


def test_a_single_file_is_a_volume_of_one_slice(tmp_path):
    paths = Ct().write(tmp_path)
    scan = read(paths[4])
    assert scan.hu.shape == (1, 20, 24)
    assert scan.spacing_mm == pytest.approx((0.9, 0.7, 2.5))
    np.testing.assert_array_equal(scan.hu[0], phantom_hu()[4])


# ---- transfer syntaxes ----------------------------------------------------------------------------------------------

SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "big endian": "1.2.840.10008.1.2.2",
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
}

NOISE = np.random.default_rng(0).integers(-1000, 1500, (3, 40, 48))
"""OpenJPEG needs 32 pixels a side, and noise does not compress to nothing."""


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", SYNTAXES)
def test_lossless_transfer_syntaxes_give_the_same_hu(tmp_path, name, signed):
    Ct(hu=NOISE, transfer_syntax=SYNTAXES[name], signed=signed, intercept=0 if signed else -1024).write(tmp_path)
    scan = read(tmp_path)
    assert dcmread(scan.files[0]).file_meta.TransferSyntaxUID == SYNTAXES[name]
    np.testing.assert_array_equal(scan.hu, NOISE)
    assert scan.codes == ()


def test_lossy_jpeg2000_is_flagged(tmp_path):
    for index in range(3):
        dataset = Ct(hu=NOISE).dataset(index)
        dataset.compress("1.2.840.10008.1.2.4.91", j2k_cr=[1.5], generate_instance_uid=False)
        dataset.save_as(tmp_path / f"{index}", enforce_file_format=True)
    scan = read(tmp_path)
    assert scan.codes == (ReasonCode.LOSSY,)
    assert 0 < np.abs(scan.hu - NOISE).max() < 200


@pytest.mark.parametrize("name", ["RLE", "JPEG-LS", "JPEG 2000"])
def test_compressed_pixels_cut_short_are_refused_when_read(tmp_path, name):
    paths = Ct(hu=NOISE, transfer_syntax=SYNTAXES[name]).write(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-900])
    (series,) = scan_folder(tmp_path).series
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code is ReasonCode.PIXEL_TRUNCATED
    assert caught.value.files == (str(paths[2]),)


def test_fewer_pixels_than_rows_and_columns_are_refused(tmp_path):
    """The element's length is honest, the header's matrix is not."""
    Ct(edit=lambda d, i: setattr(d, "PixelData", d.PixelData[:-48])).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    assert caught.value.code is ReasonCode.PIXEL_TRUNCATED


def test_more_pixels_than_rows_and_columns_are_refused(tmp_path):
    Ct(edit=lambda d, i: setattr(d, "PixelData", d.PixelData + bytes(48))).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    assert caught.value.code is ReasonCode.PIXEL_TRUNCATED


@pytest.mark.parametrize("keyword", ["BitsStored", "BitsAllocated", "PixelRepresentation", "PixelData"])
def test_without_a_needed_pixel_tag_the_refusal_has_a_code(tmp_path, keyword):
    def without(dataset, index):
        del dataset[keyword]

    Ct(edit=without).write(tmp_path)
    with pytest.raises(ScanError):
        read(tmp_path)


def test_j2k_whose_stream_contradicts_the_header_is_read_as_simpleitk_reads_it_or_refused(tmp_path):
    source = get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)
    if source is None:
        pytest.skip("this pydicom ships no J2K_pixelrep_mismatch.dcm")
    dataset = dcmread(source)
    assert dataset.SOPClassUID == CT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    scan = read(source)
    kept = scan.hu[0] != AIR_HU
    np.testing.assert_allclose(scan.hu[0][kept], expected[kept], atol=1)


# ---- the record -----------------------------------------------------------------------------------------------------


def test_scan_carries_identity_and_acquisition(tmp_path):
    Ct(edit=lambda d, i: setattr(d, "ConvolutionKernel", ["B", "30f"])).write(tmp_path)
    header = read(tmp_path).header
    assert (header.patient_id, header.sex, header.age) == ("Mueller-0815", "F", 61)
    assert (header.site, header.site_source, header.manufacturer) == ("North", "InstitutionName", "Acme")
    assert (header.kernel, header.slice_thickness_mm, len(header.sop_uids)) == ("B\\30f", 2.5, 12)


def test_hu_are_float32_finite_and_read_only(tmp_path):
    Ct().write(tmp_path)
    scan = read(tmp_path)
    assert scan.hu.dtype == np.float32
    assert np.isfinite(scan.hu).all()
    with pytest.raises(ValueError, match="read-only"):
        scan.hu[0, 0, 0] = 0


# ---- real CT --------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_series_equals_simpleitk(real_data):
    inventory = scan_folder(real_data / "pet_ct_volume")
    (series,) = [one for one in inventory.series if one.usable]
    assert series.shape[0] == 174
    assert [entry.code for entry in inventory.files].count(ReasonCode.NOT_VOLUME) == 2
    scan = read(series)
    hu, affine = by_sitk(scan.files)
    if ReasonCode.PADDING_APPLIED in scan.codes:
        hu = np.where(scan.hu == AIR_HU, AIR_HU, hu)
    assert np.abs(scan.hu - hu).max() <= 1
    np.testing.assert_allclose(scan.affine, affine, atol=0.01)


@pytest.mark.realdata
def test_real_slices_are_all_accounted_for_and_ge_padding_is_masked(real_data):
    folder = real_data / "siim_ct_100"
    inventory = scan_folder(folder)
    images = [entry for entry in inventory.files if entry.path.endswith(".dcm")]
    assert len(images) == 100
    assert [entry.code for entry in images].count(ReasonCode.DUP_IDENTICAL) == 5
    ge = [one for one in inventory.series if one.usable and one.header.manufacturer.startswith("GE")]
    masked = [scan for scan in map(read, ge[:8]) if ReasonCode.PADDING_APPLIED in scan.codes]
    assert masked  # others hold air of -2048 HU where their header announces a padding that no pixel has
    assert all(scan.hu.min() == AIR_HU and 0.15 < scan.padding_fraction < 0.3 for scan in masked)
    assert {entry.outcome for entry in images} <= {Outcome.OK, Outcome.FLAG, Outcome.SKIP, Outcome.QUARANTINE}
