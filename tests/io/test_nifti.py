"""NIfTI, NRRD and MetaImage: the same Scan as from DICOM, or a named refusal."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from ct_builder import GRIDS, Ct, Grid, assert_is_phantom, phantom_hu

from medvit.io import read, scan_folder
from medvit.records import Outcome, ReasonCode, ScanError

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
C = ReasonCode


def nifti(path, grid=None, values=None, *, sform=1, qform=1, edit=None):
    """Write the phantom; NIfTI arrays are (X, Y, Z) and its patient system is RAS."""
    values = phantom_hu().astype(np.int16).transpose(2, 1, 0) if values is None else values
    affine = LPS_TO_RAS @ (grid or Grid()).affine
    image = nib.Nifti1Image(values, affine)
    image.header.set_slope_inter(1, 0)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    if edit is not None:
        edit(image)
    nib.save(image, path)
    return path


def itk(path, grid=None, *, compress=False):
    image = sitk.GetImageFromArray(phantom_hu().astype(np.int16))
    affine = (grid or Grid()).affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(path), compress)
    return path


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def refusal(path):
    with pytest.raises(ScanError) as caught:
        read(path)
    return caught.value.code


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("name", GRIDS)
def test_nifti_is_the_phantom_in_patient_lps(tmp_path, name, suffix):
    """Neither left and right nor front and back are exchanged between RAS and LPS."""
    scan = read(nifti(tmp_path / f"ct{suffix}", GRIDS[name]))
    assert_is_phantom(scan, GRIDS[name], hu=1)  # the affine is float32 in the file


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nhdr"])
@pytest.mark.parametrize("name", GRIDS)
def test_nrrd_and_metaimage_are_the_phantom_too(tmp_path, name, suffix):
    assert_is_phantom(read(itk(tmp_path / f"ct{suffix}", GRIDS[name])), GRIDS[name], hu=1)


def test_all_formats_give_the_scan_that_dicom_gives(tmp_path):
    grid = GRIDS["oblique"]
    Ct(grid=grid).write(tmp_path / "dicom")
    dicom = read(tmp_path / "dicom")
    for path in (nifti(tmp_path / "a.nii.gz", grid), itk(tmp_path / "a.nrrd", grid), itk(tmp_path / "a.mha", grid)):
        scan = read(path)
        np.testing.assert_array_equal(scan.hu, dicom.hu)
        np.testing.assert_allclose(scan.affine, dicom.affine, atol=1e-4)


def test_nrrd_in_ras_space_is_turned_to_lps(tmp_path):
    raw = phantom_hu().astype("<i2").tobytes()
    ras = LPS_TO_RAS @ Grid().affine
    axes = " ".join(f"({','.join(f'{v:.8g}' for v in ras[:3, i])})" for i in range(3))
    header = (
        "NRRD0004\ntype: int16\ndimension: 3\nspace: right-anterior-superior\nsizes: 24 20 12\n"
        f"space directions: {axes}\nendian: little\nencoding: raw\n"
        f"space origin: ({','.join(f'{v:.8g}' for v in ras[:3, 3])})\n\n"
    )
    (tmp_path / "ct.nrrd").write_bytes(header.encode() + raw)
    assert_is_phantom(read(tmp_path / "ct.nrrd"))


def test_scaled_nifti_is_scaled(tmp_path):
    values = ((phantom_hu() + 1024) * 2).astype(np.int16).transpose(2, 1, 0)
    path = patched(nifti(tmp_path / "ct.nii", values=values), 112, np.array([0.5, -1024], "<f4").tobytes())
    assert_is_phantom(read(path))


def test_slope_of_zero_means_unscaled_and_is_flagged(tmp_path):
    path = patched(nifti(tmp_path / "ct.nii"), 112, np.array([0, 5], "<f4").tobytes())
    scan = read(path)
    assert_is_phantom(scan)
    assert scan.codes == (ReasonCode.NIFTI_SCALE,)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_nifti_is_refused(tmp_path, suffix):
    path = nifti(tmp_path / f"ct{suffix}")
    path.write_bytes(path.read_bytes()[:-60])
    assert refusal(path) is (C.GZIP_CORRUPT if suffix == ".nii.gz" else C.PIXEL_TRUNCATED)


def test_whole_gz_stream_of_a_truncated_nifti_is_refused(tmp_path):
    plain = nifti(tmp_path / "ct.nii").read_bytes()
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(plain[:-2000]))
    assert refusal(tmp_path / "ct.nii.gz") is C.PIXEL_TRUNCATED


def test_bad_checksum_is_refused(tmp_path):
    """SimpleITK reads this file without a word."""
    path = nifti(tmp_path / "ct.nii.gz")
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0xFF  # CRC32
    path.write_bytes(raw)
    assert refusal(path) is C.GZIP_CORRUPT


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [False, True])
def test_truncated_nrrd_and_metaimage_are_refused(tmp_path, suffix, compress):
    path = itk(tmp_path / f"ct{suffix}", compress=compress)
    path.write_bytes(path.read_bytes()[: -(path.stat().st_size // 4)])
    assert refusal(path) is C.PIXEL_TRUNCATED


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_values_are_refused(tmp_path, value):
    values = phantom_hu().astype(np.float32).transpose(2, 1, 0)
    values[3, 4, 5] = value
    assert refusal(nifti(tmp_path / "ct.nii", values=values)) is C.NIFTI_NONFINITE


def shifted_qform(image):
    moved = LPS_TO_RAS @ Grid().affine
    moved[0, 3] += 0.5
    image.set_qform(moved, 1)


def flipped_qform(image):
    image.set_qform(LPS_TO_RAS @ Grid(row=(-1, 0, 0), column=(0, 1, 0)).affine, 1)


def sheared_sform(image):
    affine = LPS_TO_RAS @ Grid().affine
    affine[0, 1] += 0.05
    image.set_sform(affine, 1)
    image.set_qform(None, 0)


def bad_quaternion(image):
    image.header["quatern_b"], image.header["quatern_c"] = 2, 2


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (shifted_qform, C.NIFTI_AFFINE),
        (flipped_qform, C.NIFTI_AFFINE),
        (lambda image: (image.set_sform(None, 0), image.set_qform(None, 0)), C.NIFTI_AFFINE),
        (sheared_sform, C.NIFTI_SHEAR),
        (bad_quaternion, C.NIFTI_AFFINE),
    ],
    ids=["shifted", "flipped", "unset", "sheared", "bad quaternion"],
)
def test_doubtful_geometry_is_refused(tmp_path, edit, code):
    assert refusal(nifti(tmp_path / "ct.nii", edit=edit)) is code


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (1, 1), (2, 1), (4, 1)])
def test_either_form_is_enough(tmp_path, sform, qform):
    assert_is_phantom(read(nifti(tmp_path / "ct.nii", sform=sform, qform=qform)), hu=1)


def test_four_dimensions_are_refused_and_a_trailing_one_is_not(tmp_path):
    values = phantom_hu().astype(np.int16).transpose(2, 1, 0)
    assert_is_phantom(read(nifti(tmp_path / "one.nii", values=values[..., None])))
    assert refusal(nifti(tmp_path / "two.nii", values=np.stack([values, values], -1))) is C.NIFTI_NDIM


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 5), np.int16),
        np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]),
        np.arange(120).reshape(4, 5, 6).astype(np.complex64),
    ],
    ids=["2-D", "RGB", "complex"],
)
def test_what_is_no_scalar_volume_is_refused(tmp_path, values):
    def unscaled(image):
        if values.dtype.names:
            image.header.set_slope_inter(None, None)

    assert refusal(nifti(tmp_path / "ct.nii", values=values, edit=unscaled)) is C.NIFTI_NDIM


def test_colour_metaimage_is_refused(tmp_path):
    """SimpleITK would cast it to one channel without a word."""
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 255, (4, 5, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "ct.mha"))
    assert refusal(tmp_path / "ct.mha") is C.NIFTI_NDIM


@pytest.mark.parametrize("values", [np.full((4, 5, 6), 7, np.int16), np.linspace(-1e30, 1e39, 120).reshape(4, 5, 6)])
def test_implausible_values_are_refused(tmp_path, values):
    assert refusal(nifti(tmp_path / "ct.nii", values=values)) is C.HU_IMPLAUSIBLE


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize(
    "content", [b"", b"junk" * 200, b"\x5c\x01\0\0" + b"\xff" * 500], ids=["empty", "junk", "dims"]
)
def test_garbage_with_a_volume_name_is_refused_by_code(tmp_path, suffix, content):
    path = tmp_path / f"ct{suffix}"
    path.write_bytes(content)
    assert refusal(path) in (C.PIXEL_TRUNCATED, C.GZIP_CORRUPT, C.NIFTI_NDIM)


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (70, np.array([999], "<i2").tobytes()),  # unknown datatype
        (42, np.array([32767, 32767, 32767], "<i2").tobytes()),  # 70 TB
        (42, np.array([0, 20, 12], "<i2").tobytes()),
        (42, np.array([-5, 20, 12], "<i2").tobytes()),
        (108, np.array([np.nan], "<f4").tobytes()),  # where the data begin
        (108, np.array([1e9], "<f4").tobytes()),
    ],
    ids=["datatype", "huge", "zero", "negative", "offset nan", "offset far"],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_hostile_header_fields_are_refused_by_code(tmp_path, suffix, offset, content):
    path = patched(nifti(tmp_path / "ct.nii"), offset, content)
    if suffix == ".nii.gz":
        packed = tmp_path / "ct.nii.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert refusal(path) in (C.PIXEL_TRUNCATED, C.NIFTI_NDIM)


def test_a_missing_volume_file_is_an_io_error(tmp_path):
    assert refusal(tmp_path / "ct.nii") is C.IO_ERROR
    assert refusal(tmp_path / "ct.dcm") is C.IO_ERROR


def test_volume_files_are_listed_as_series_of_their_own(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    itk(tmp_path / "b.nrrd")
    inventory = scan_folder(tmp_path)
    assert [entry.outcome for entry in inventory.files] == [Outcome.OK, Outcome.OK]
    assert len({series.uid for series in inventory.series}) == 2
    for series in inventory.series:
        assert_is_phantom(read(series))


def test_data_file_beside_a_header_file_is_no_fault(tmp_path):
    itk(tmp_path / "ct.mhd")
    itk(tmp_path / "ct2.nhdr")
    assert {entry.outcome for entry in scan_folder(tmp_path).files} <= {Outcome.OK, Outcome.SKIP}
