"""NIfTI, NRRD and MetaImage: the same Scan as from DICOM, or a named refusal.

SimpleITK and nibabel write the good files and are the second opinion on them; on damaged ones they are not asked, for
they read many of them silently.
"""

import gzip
import itertools
import os
import pickle
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from multiprocessing import shared_memory

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from ct_builder import COLUMNS, GRIDS, ROWS, SLICES, SPACING_MM, Ct, Grid, assert_is_phantom, phantom_hu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvit.io import read, read_files, scan_folder, voxels
from medvit.io.nifti import examine, fill
from medvit.records import Outcome, ReasonCode, ScanError, UsageError

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
C = ReasonCode
VALUES = phantom_hu().astype(np.int16).transpose(2, 1, 0)  # NIfTI arrays are (X, Y, Z)

# --- good files ------------------------------------------------------------------------------------------------------


def nifti(path, grid=None, values=VALUES, *, sform=1, qform=1, edit=None, kind=nib.Nifti1Image, big=False):
    """Write the phantom; NIfTI's patient system is RAS."""
    affine = LPS_TO_RAS @ (grid or Grid()).affine
    header = kind.header_class(endianness=">") if big else None
    image = kind(values, affine, header, dtype=values.dtype)
    if not values.dtype.names:
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


def nrrd(path, pixels=None, *, detached=None, affine=None, **fields):
    """An NRRD by hand; fields set to None are left out, others replace or join what is there."""
    affine = Grid().affine if affine is None else affine
    known = {
        "type": "int16",
        "dimension": 3,
        "space": "left-posterior-superior",
        "sizes": f"{COLUMNS} {ROWS} {SLICES}",
        "space directions": " ".join(f"({','.join(f'{v:.9g}' for v in affine[:3, i])})" for i in range(3)),
        "endian": "little",
        "encoding": "raw",
        "space origin": f"({','.join(f'{v:.9g}' for v in affine[:3, 3])})",
    }
    known |= {name.replace("_", " "): value for name, value in fields.items()}
    known |= {} if detached is None else {"data file": detached}
    lines = [f"{name}: {value}" for name, value in known.items() if value is not None]
    pixels = phantom_hu().astype("<i2").tobytes() if pixels is None else pixels
    path.write_bytes("\n".join(["NRRD0004", *lines, "", ""]).encode() + (pixels if detached is None else b""))
    return path


def meta(path, pixels=None, **fields):
    """A MetaImage by hand, as `nrrd`."""
    affine = Grid().affine
    known = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": " ".join(f"{v:.9g}" for v in affine[:3, 3]),
        "ElementSpacing": " ".join(str(v) for v in SPACING_MM),
        "DimSize": f"{COLUMNS} {ROWS} {SLICES}",
        "ElementType": "MET_SHORT",
    } | fields
    known["ElementDataFile"] = known.pop("ElementDataFile", "LOCAL")  # ends the header
    lines = [f"{name} = {value}" for name, value in known.items() if value is not None]
    pixels = phantom_hu().astype("<i2").tobytes() if pixels is None else pixels
    path.write_bytes("\n".join([*lines, ""]).encode() + (pixels if known["ElementDataFile"] == "LOCAL" else b""))
    return path


def refusal(path):
    with pytest.raises(ScanError) as caught:
        read(path)
    assert caught.value.files == (str(path),)
    assert str(path.parent) not in str(caught.value)
    return caught.value.code


WRITERS = {
    "sform.nii": lambda path, grid: nifti(path, grid, qform=0),
    "qform.nii": lambda path, grid: nifti(path, grid, sform=0),
    "both.nii.gz": nifti,
    "BOTH.NII.GZ": nifti,
    "nifti2.nii": lambda path, grid: nifti(path, grid, kind=nib.Nifti2Image),
    "nifti2.nii.gz": lambda path, grid: nifti(path, grid, kind=nib.Nifti2Image, big=True),
    "big.nii": lambda path, grid: nifti(path, grid, big=True),
    "ct.nrrd": itk,
    "packed.nrrd": lambda path, grid: itk(path, grid, compress=True),
    "ct.nhdr": itk,
    "ct.mha": itk,
    "packed.mha": lambda path, grid: itk(path, grid, compress=True),
    "ct.mhd": itk,
    "packed.mhd": lambda path, grid: itk(path, grid, compress=True),
}
AXES = [(order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]


def turned(order, signs):
    """The grid whose voxel axes lie along the patient's axes in this order, with these signs."""
    row, column, normal = (tuple(sign * np.eye(3)[axis]) for axis, sign in zip(order, signs, strict=True))
    return Grid(row=row, column=column, step=tuple(np.array(normal) * SPACING_MM[2]))


def by_itk(path):
    """Values (Z, Y, X) and LPS affine, as SimpleITK reads them."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


@pytest.mark.parametrize("name", ["sform.nii", "qform.nii", "packed.nrrd", "ct.mha"])
@pytest.mark.parametrize(("order", "signs"), AXES, ids=lambda value: "".join(f"{v:d}" for v in value))
def test_all_48_axis_orders_lie_where_the_phantom_is_and_where_simpleitk_sees_them(tmp_path, order, signs, name):
    grid = turned(order, signs)
    path = WRITERS[name](tmp_path / name, grid)
    scan = read(path)
    assert_is_phantom(scan, grid, hu=0.1)
    values, affine = by_itk(path)
    np.testing.assert_array_equal(scan.hu, values)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_format_is_the_phantom_in_patient_lps(tmp_path, grid, name):
    path = WRITERS[name](tmp_path / name, GRIDS[grid])
    assert_is_phantom(read(path), GRIDS[grid], hu=1)  # NIfTI-1 has its affine in float32
    if ".nii" in name:
        image = nib.load(path)
        np.testing.assert_allclose(read(path).affine, LPS_TO_RAS @ image.affine, atol=1e-5)


def test_all_formats_give_the_scan_that_dicom_gives(tmp_path):
    grid = GRIDS["oblique"]
    Ct(grid=grid).write(tmp_path / "dicom")
    dicom = read(tmp_path / "dicom")
    for name, write in WRITERS.items():
        scan = read(write(tmp_path / name, grid))
        np.testing.assert_array_equal(scan.hu, dicom.hu)
        np.testing.assert_allclose(scan.affine, dicom.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("space", "signs"),
    [("right-anterior-superior", (-1, -1, 1)), ("RAS", (-1, -1, 1)), ("left-anterior-superior", (1, -1, 1))],
)
def test_nrrd_in_another_patient_space_is_turned_to_lps(tmp_path, space, signs):
    path = nrrd(tmp_path / "ct.nrrd", space=space, affine=np.diag([*signs, 1.0]) @ GRIDS["oblique"].affine)
    assert_is_phantom(read(path), GRIDS["oblique"])
    np.testing.assert_allclose(read(path).affine, by_itk(path)[1], atol=1e-6)


@pytest.mark.parametrize("code", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_number_type_of_either_byte_order_is_read(tmp_path, code, order):
    values = (np.arange(COLUMNS * ROWS * SLICES) % 100).reshape(SLICES, ROWS, COLUMNS).astype(order + code)
    long = {"i": "int", "u": "uint"}
    nrrd_type = {"f4": "float", "f8": "double"}.get(code, f"{long.get(code[0])}{8 * int(code[1])}")
    names = {"i1": "CHAR", "i2": "SHORT", "i4": "INT", "i8": "LONG_LONG", "f4": "FLOAT", "f8": "DOUBLE"}
    meta_type = names.get(code) or "U" + names["i" + code[1]]
    raw, endian = values.tobytes(), "big" if order == ">" else "little"
    paths = [
        nrrd(tmp_path / "a.nrrd", raw, type=nrrd_type, endian=endian),
        meta(tmp_path / "a.mha", raw, ElementType=f"MET_{meta_type}", BinaryDataByteOrderMSB=str(order == ">")),
        nifti(tmp_path / "a.nii", values=values.transpose(2, 1, 0), big=order == ">"),
    ]
    for path in paths:
        np.testing.assert_array_equal(read(path).hu, values.astype(np.float32))
    for path in paths[:2]:
        np.testing.assert_array_equal(by_itk(path)[0], values)


@pytest.mark.parametrize("skip", ["7", "-1"])
def test_pixels_behind_a_foreign_header_are_found(tmp_path, skip):
    (tmp_path / "ct.raw").write_bytes(b"foreign" + phantom_hu().astype("<i2").tobytes())
    assert_is_phantom(read(nrrd(tmp_path / "ct.nhdr", detached="./ct.raw", byte_skip=skip)))
    assert_is_phantom(read(meta(tmp_path / "ct.mhd", ElementDataFile="ct.raw", HeaderSize=skip)))


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def floats(*values):
    return np.array(values, "<f4").tobytes()


def test_scaled_nifti_is_scaled(tmp_path):
    path = nifti(tmp_path / "ct.nii", values=((VALUES + 1024) * 2).astype(np.int16))
    assert_is_phantom(read(patched(path, 112, floats(0.5, -1024))))


@pytest.mark.parametrize("slope", [0, np.nan])
def test_slope_of_zero_or_nan_means_unscaled_and_is_flagged(tmp_path, slope):
    path = patched(nifti(tmp_path / "ct.nii"), 112, floats(slope, 5))
    assert_is_phantom(read(path))
    assert read(path).codes == examine(path).codes == (C.NIFTI_SCALE,)


def test_trailing_axes_of_one_and_a_qfac_of_zero_are_no_fault(tmp_path):
    assert_is_phantom(read(nifti(tmp_path / "one.nii", values=VALUES[..., None])))
    assert_is_phantom(read(patched(nifti(tmp_path / "qfac.nii", sform=0), 76, floats(0))))


@pytest.mark.parametrize("cut", [0, 1, 7, 352, 5000])
def test_a_gz_stream_of_several_members_is_one_stream(tmp_path, cut):
    plain = nifti(tmp_path / "ct.nii").read_bytes()
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(gzip.compress(plain[:cut]) + gzip.compress(b"") + gzip.compress(plain[cut:]))
    assert_is_phantom(read(path))


# --- header and voxels apart -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_the_header_alone_tells_shape_and_affine_and_crosses_processes(tmp_path, name):
    path = WRITERS[name](tmp_path / name, GRIDS["sagittal"])
    header = pickle.loads(pickle.dumps(examine(path)))
    assert header.shape == (SLICES, ROWS, COLUMNS)
    assert header.pixels.path.parent == tmp_path
    np.testing.assert_array_equal(header.affine, read(path).affine)


def test_examine_looks_at_no_pixel(tmp_path):
    path = nifti(tmp_path / "ct.nii.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    assert examine(path).shape == (SLICES, ROWS, COLUMNS)
    assert refusal(path) is C.GZIP_CORRUPT


def test_voxels_go_into_shared_memory(tmp_path):
    path = nifti(tmp_path / "ct.nii.gz")
    shared = shared_memory.SharedMemory(create=True, size=4 * VALUES.size)
    try:
        out = np.ndarray((SLICES, ROWS, COLUMNS), np.float32, shared.buf)
        assert fill(path, out) == ()
        np.testing.assert_array_equal(out, phantom_hu())
        del out
    finally:
        shared.close()
        shared.unlink()


def test_fill_wants_the_array_that_examine_told(tmp_path):
    path = nifti(tmp_path / "ct.nii")
    with pytest.raises(ScanError) as caught:
        fill(path, np.empty((SLICES + 1, ROWS, COLUMNS), np.float32))
    assert caught.value.code is C.INCOMPLETE
    for out in (np.empty(VALUES.shape[::-1]), np.empty(VALUES.shape, np.float32).T):
        with pytest.raises(ValueError, match="C-contiguous float32"):
            fill(path, out)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_filling_holds_a_few_megabytes_beside_the_volume(tmp_path, suffix):
    values = np.random.default_rng(0).integers(-1000, 1000, (200, 200, 250), np.int16)
    path = nifti(tmp_path / f"ct{suffix}", values=values)
    out = np.empty(values.shape[::-1], np.float32)
    tracemalloc.start()
    try:
        fill(path, out)
        assert tracemalloc.get_traced_memory()[1] < 35e6
    finally:
        tracemalloc.stop()


def test_listing_a_folder_without_volume_files_pays_for_no_volume_reader(tmp_path):
    Ct().write(tmp_path)
    code = "import sys, medvit.io; medvit.io.scan_folder(sys.argv[1]); print({'nibabel', 'SimpleITK'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


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
    assert [examine(tmp_path / name).pixels.path.name for name in ("ct.mhd", "ct2.nhdr")] == ["ct.raw", "ct2.raw"]


# --- damage: every case with the code it must end in -----------------------------------------------------------------


def cut(write, count):
    def damaged(folder):
        path = write(folder)
        path.write_bytes(path.read_bytes()[:-count])
        return path

    return damaged


def appended(write, tail):
    def damaged(folder):
        path = write(folder)
        path.write_bytes(path.read_bytes() + tail)
        return path

    return damaged


def with_bytes(name, content):
    def damaged(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return damaged


def nii(name="ct.nii", **options):
    return lambda folder: nifti(folder / name, **options)


def nii_patched(offset, content, **options):
    return lambda folder: patched(nifti(folder / "ct.nii", **options), offset, content)


def gz_of(write):
    def packed(folder):
        path = write(folder)
        (folder / "packed.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
        return folder / "packed.nii.gz"

    return packed


def gz_tail(before_end):
    """A bit of the CRC or the length behind the deflate stream is another."""

    def damaged(folder):
        path = nifti(folder / "ct.nii.gz")
        content = bytearray(path.read_bytes())
        content[-before_end] ^= 1
        path.write_bytes(content)
        return path

    return damaged


def nrrd_with(pixels=None, name="ct.nrrd", **fields):
    return lambda folder: nrrd(folder / name, pixels, **fields)


def meta_with(pixels=None, name="ct.mha", **fields):
    return lambda folder: meta(folder / name, pixels, **fields)


def itk_written(name, *, compress=False):
    return lambda folder: itk(folder / name, compress=compress)


def edited(sform=None, qform=None):
    """Another grid in sform or qform, both with code 1: nibabel and ITK choose differently."""

    def edit(image):
        for grid, write in ((sform, image.set_sform), (qform, image.set_qform)):
            if grid is not None:
                write(LPS_TO_RAS @ grid.affine, 1)

    return nii(edit=edit)


def sheared(folder):
    def edit(image):
        affine = LPS_TO_RAS @ Grid().affine
        affine[0, 1] += 0.05
        image.set_sform(affine, 1)

    return nifti(folder / "ct.nii", qform=0, edit=edit)


def unset(image):
    image.set_sform(None, 0)
    image.set_qform(None, 0)


def with_value(value, **fields):
    values = phantom_hu().astype("<f4")
    values[3, 4, 5] = value
    return values


def not_finite(name, value):
    def write(folder):
        values = with_value(value)
        if name.endswith("nrrd"):
            return nrrd(folder / name, values.tobytes(), type="float")
        if name.endswith("mha"):
            return meta(folder / name, values.tobytes(), ElementType="MET_FLOAT")
        return nifti(folder / name, values=values.transpose(2, 1, 0))

    return write


def beside(write, target):
    """A header that names `target` as its data file; a good one lies in a folder beside, and behind links."""

    def damaged(folder):
        (folder / "inside").mkdir()
        for place in (folder, folder / "inside"):
            (place / "secret.raw").write_bytes(phantom_hu().astype("<i2").tobytes())
        (folder / "inside" / "sub").mkdir()
        (folder / "inside" / "link.raw").symlink_to(folder / "secret.raw")
        os.mkfifo(folder / "inside" / "pipe.raw")
        return write(folder / "inside", target.format(folder=folder))

    return damaged


def nhdr_naming(folder, target):
    return nrrd(folder / "ct.nhdr", detached=target)


def mhd_naming(folder, target):
    return meta(folder / "ct.mhd", ElementDataFile=target)


RAW = phantom_hu().astype("<i2").tobytes()
ELSEWHERE = ["../secret.raw", "{folder}/secret.raw", "sub/../../secret.raw", "..", "link.raw", "pipe.raw", "sub"]
ELSEWHERE += ["/dev/zero", "C:\\secret.raw", "..\\secret.raw", "secret.raw\x00.png"]
RGB = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])

DAMAGE = {
    # the file is cut, or grew
    "nii empty": (with_bytes("ct.nii", b""), C.PIXEL_TRUNCATED),
    "nii.gz empty": (with_bytes("ct.nii.gz", b""), C.GZIP_CORRUPT),
    "nrrd empty": (with_bytes("ct.nrrd", b""), C.TAG_INVALID),
    "mha empty": (with_bytes("ct.mha", b""), C.TAG_INVALID),
    "nii header cut": (cut(nii(), len(RAW) + 100), C.PIXEL_TRUNCATED),
    "nii-2 header cut": (cut(nii(kind=nib.Nifti2Image), len(RAW) + 100), C.PIXEL_TRUNCATED),
    "nii cut by 1": (cut(nii(), 1), C.PIXEL_TRUNCATED),
    "nii cut by 60": (cut(nii(), 60), C.PIXEL_TRUNCATED),
    "nii-2 cut": (cut(nii(kind=nib.Nifti2Image), 60), C.PIXEL_TRUNCATED),
    "nii longer": (appended(nii(), b"\0\0"), C.PIXEL_TRUNCATED),
    "gz cut by 1": (cut(nii("ct.nii.gz"), 1), C.GZIP_CORRUPT),
    "gz cut by 60": (cut(nii("ct.nii.gz"), 60), C.GZIP_CORRUPT),
    "gz without its trailer": (cut(nii("ct.nii.gz"), 8), C.GZIP_CORRUPT),
    "gz of a cut nii": (gz_of(cut(nii(), 2000)), C.PIXEL_TRUNCATED),
    "gz of a longer nii": (gz_of(appended(nii(), b"\0" * 99)), C.PIXEL_TRUNCATED),
    "gz with garbage behind": (appended(nii("ct.nii.gz"), b"garbage behind"), C.GZIP_CORRUPT),
    "gz with zeros behind": (appended(nii("ct.nii.gz"), bytes(512)), C.GZIP_CORRUPT),
    "gz with another member behind": (appended(nii("ct.nii.gz"), gzip.compress(RAW)), C.PIXEL_TRUNCATED),
    "gz with a bad CRC": (gz_tail(6), C.GZIP_CORRUPT),
    "gz with a bad length": (gz_tail(2), C.GZIP_CORRUPT),
    "gz that is none": (with_bytes("ct.nii.gz", b"junk" * 200), C.GZIP_CORRUPT),
    "nrrd cut": (cut(itk_written("ct.nrrd"), 2), C.PIXEL_TRUNCATED),
    "nrrd half": (cut(itk_written("ct.nrrd"), len(RAW) // 2), C.PIXEL_TRUNCATED),
    "nrrd longer": (appended(itk_written("ct.nrrd"), b"\0\0"), C.PIXEL_TRUNCATED),
    "nrrd gzip cut": (cut(itk_written("ct.nrrd", compress=True), 300), C.GZIP_CORRUPT),
    "nrrd gzip without its trailer": (cut(itk_written("ct.nrrd", compress=True), 8), C.GZIP_CORRUPT),
    "nrrd gzip of a part": (nrrd_with(gzip.compress(RAW[:-2000]), encoding="gzip"), C.PIXEL_TRUNCATED),
    "nrrd gzip of more": (nrrd_with(gzip.compress(RAW + RAW), encoding="gzip"), C.PIXEL_TRUNCATED),
    "nrrd gzip that is none": (nrrd_with(RAW, encoding="gzip"), C.GZIP_CORRUPT),
    "nrrd without pixels": (nrrd_with(b""), C.PIXEL_TRUNCATED),
    "mha cut": (cut(itk_written("ct.mha"), 2), C.PIXEL_TRUNCATED),
    "mha half": (cut(itk_written("ct.mha"), len(RAW) // 2), C.PIXEL_TRUNCATED),
    "mha longer": (appended(itk_written("ct.mha"), b"\0\0"), C.PIXEL_TRUNCATED),
    "mha zlib cut": (cut(itk_written("ct.mha", compress=True), 300), C.PIXEL_TRUNCATED),
    "mha zlib cut, size not told": (meta_with(zlib.compress(RAW)[:-9], CompressedData="True"), C.GZIP_CORRUPT),
    "mha zlib of a part": (meta_with(zlib.compress(RAW[:-2]), CompressedData="True"), C.PIXEL_TRUNCATED),
    "mha zlib of more": (meta_with(zlib.compress(RAW + b"\0"), CompressedData="True"), C.PIXEL_TRUNCATED),
    "mha zlib that is none": (meta_with(RAW, CompressedData="True"), C.GZIP_CORRUPT),
    # no such header, or one that nobody could mean
    "nii junk": (with_bytes("ct.nii", b"junk" * 200), C.TAG_INVALID),
    "nii.gz of junk": (with_bytes("ct.nii.gz", gzip.compress(b"junk" * 200)), C.TAG_INVALID),
    "nii of ones": (with_bytes("ct.nii", b"\x5c\x01\0\0" + b"\xff" * 500), C.TAG_INVALID),
    "nii that is a gz": (with_bytes("ct.nii", gzip.compress(os.urandom(600))), C.TAG_INVALID),
    "nrrd junk": (with_bytes("ct.nrrd", b"junk" * 200), C.TAG_INVALID),
    "nrrd without an end": (with_bytes("ct.nrrd", b"NRRD0004\n" + b"# comment\n" * 200_000), C.TAG_INVALID),
    "mha junk": (with_bytes("ct.mha", b"junk" * 200), C.TAG_INVALID),
    "mha without an end": (with_bytes("ct.mha", b"ObjectType" + b" " * 2_000_000), C.TAG_INVALID),
    "nii pair": (nii_patched(344, b"ni1\0"), C.TAG_INVALID),
    "nii datatype unknown": (nii_patched(70, np.array([999], "<i2").tobytes()), C.TAG_INVALID),
    "nii offset NaN": (nii_patched(108, floats(np.nan)), C.TAG_INVALID),
    "nii offset inside the header": (nii_patched(108, floats(48)), C.TAG_INVALID),
    "nii offset far": (nii_patched(108, floats(1e9)), C.PIXEL_TRUNCATED),
    "gz offset far": (gz_of(nii_patched(108, floats(1e9))), C.PIXEL_TRUNCATED),
    "nii huge": (nii_patched(42, np.array([32767] * 3, "<i2").tobytes()), C.RESOURCE_LIMIT),
    "gz huge": (gz_of(nii_patched(42, np.array([32767] * 3, "<i2").tobytes())), C.RESOURCE_LIMIT),
    "gz claims what it cannot hold": (gz_of(nii_patched(42, np.array([1024] * 3, "<i2").tobytes())), C.PIXEL_TRUNCATED),
    "nrrd huge": (nrrd_with(sizes="99999 99999 99999"), C.RESOURCE_LIMIT),
    "mha huge": (meta_with(DimSize="99999 99999 99999"), C.RESOURCE_LIMIT),
    "nrrd size no number": (nrrd_with(sizes="24 20 1_2"), C.TAG_INVALID),
    "nrrd sizes twice": (nrrd_with(Sizes="24 20 6"), C.TAG_INVALID),
    "mha size twice": (meta_with(**{"DimSize ": "24 20 6"}), C.TAG_INVALID),
    "nrrd byte order not told": (nrrd_with(endian=None), C.TAG_INVALID),
    "mha byte order not told": (meta_with(BinaryDataByteOrderMSB=None), C.TAG_INVALID),
    "mha compressed perhaps": (meta_with(CompressedData="perhaps"), C.TAG_INVALID),
    "nrrd bzip2": (nrrd_with(encoding="bzip2"), C.TS_UNSUPPORTED),
    "nrrd text": (nrrd_with(b"1 2 3", encoding="ascii"), C.TS_UNSUPPORTED),
    "nrrd lines to skip": (nrrd_with(line_skip=1), C.TS_UNSUPPORTED),
    "nrrd gzip with bytes to skip": (nrrd_with(gzip.compress(RAW), encoding="gzip", byte_skip=1), C.TS_UNSUPPORTED),
    "mha text": (meta_with(b"1 2 3", BinaryData="False"), C.TS_UNSUPPORTED),
    "nrrd of many files": (nrrd_with(detached="LIST", name="ct.nhdr"), C.TS_UNSUPPORTED),
    "nrrd of numbered files": (nrrd_with(detached="ct%03d.raw 1 12 1", name="ct.nhdr"), C.TS_UNSUPPORTED),
    "mhd of many files": (meta_with(ElementDataFile="LIST", name="ct.mhd"), C.TS_UNSUPPORTED),
    "nhdr without its data": (nrrd_with(detached="ct.raw", name="ct.nhdr"), C.IO_ERROR),
    "mhd without its data": (meta_with(ElementDataFile="ct.raw", name="ct.mhd"), C.IO_ERROR),
    # not one scalar volume
    "nii 2-D": (nii(values=VALUES[..., 0]), C.NIFTI_NDIM),
    "nii 4-D": (nii(values=np.stack([VALUES, VALUES], -1)), C.NIFTI_NDIM),
    "nii colour": (nii(values=RGB), C.NIFTI_NDIM),
    "nii complex": (nii(values=VALUES.astype(np.complex64)), C.NIFTI_NDIM),
    "nii no axis": (nii_patched(40, np.array([0], "<i2").tobytes()), C.NIFTI_NDIM),
    "nii an axis of 0": (nii_patched(42, np.array([0], "<i2").tobytes()), C.NIFTI_NDIM),
    "nii an axis of -5": (nii_patched(42, np.array([-5], "<i2").tobytes()), C.NIFTI_NDIM),
    "gz an axis of -5": (gz_of(nii_patched(42, np.array([-5], "<i2").tobytes())), C.NIFTI_NDIM),
    "nrrd 4-D": (nrrd_with(dimension=4, sizes="2 24 20 12"), C.NIFTI_NDIM),
    "nrrd colour": (nrrd_with(kinds="RGB-color domain domain"), C.NIFTI_NDIM),
    "nrrd blocks": (nrrd_with(type="block"), C.NIFTI_NDIM),
    "nrrd an axis of 0": (nrrd_with(sizes="24 0 12"), C.NIFTI_NDIM),
    "mha 4-D": (meta_with(NDims=4, DimSize="24 20 12 2"), C.NIFTI_NDIM),
    "mha colour": (meta_with(ElementNumberOfChannels=3), C.NIFTI_NDIM),
    "mha unknown type": (meta_with(ElementType="MET_SHORT_ARRAY"), C.NIFTI_NDIM),
    "mha an axis of -5": (meta_with(DimSize="24 -5 12"), C.NIFTI_NDIM),
    # where the voxels lie is not told, or told twice
    "nii codes 0 and 0": (nii(edit=unset), C.NIFTI_AFFINE),
    "nii qform moved": (edited(qform=replace(Grid(), origin=(-13.0, -40.0, 107.25))), C.NIFTI_AFFINE),
    "nii qform left for right": (edited(qform=Grid(row=(-1, 0, 0))), C.NIFTI_AFFINE),
    "nii sform left for right": (edited(sform=Grid(row=(-1, 0, 0))), C.NIFTI_AFFINE),
    "nii sform front for back": (edited(sform=Grid(column=(0, -1, 0))), C.NIFTI_AFFINE),
    "nii sform head for feet": (edited(sform=Grid(step=(0, 0, -2.5))), C.NIFTI_AFFINE),
    "nii quaternion too long": (nii_patched(256, floats(2, 2)), C.NIFTI_AFFINE),
    "nii quaternion NaN": (nii_patched(256, floats(np.nan)), C.NIFTI_AFFINE),
    "nii qfac of 7": (nii_patched(76, floats(7)), C.NIFTI_AFFINE),
    "nii pixdim negative": (nii_patched(80, floats(-0.9)), C.NIFTI_AFFINE),
    "nii sform NaN": (nii_patched(280, floats(np.nan), qform=0), C.NIFTI_AFFINE),
    "nii sform singular": (nii_patched(280, floats(0, 0, 0, 0), qform=0), C.NIFTI_AFFINE),
    "nii sform vast": (nii_patched(280, floats(3e38, 3e38, 3e38), qform=0), C.NIFTI_AFFINE),
    "nii in metres": (nii_patched(123, b"\x01"), C.NIFTI_AFFINE),
    "nii sheared": (sheared, C.NIFTI_SHEAR),
    "nrrd without a space": (nrrd_with(space=None), C.NIFTI_AFFINE),
    "nrrd of three axes somewhere": (nrrd_with(space=None, space_dimension=3), C.NIFTI_AFFINE),
    "nrrd with spacings alone": (
        nrrd_with(space=None, space_directions=None, space_origin=None, spacings="0.9 0.7 2.5"),
        C.NIFTI_AFFINE,
    ),
    "nrrd in scanner space": (nrrd_with(space="scanner-xyz"), C.NIFTI_AFFINE),
    "nrrd without directions": (nrrd_with(space_directions=None, spacings="0.9 0.7 2.5"), C.NIFTI_AFFINE),
    "nrrd without an origin": (nrrd_with(space_origin=None), C.NIFTI_AFFINE),
    "nrrd direction no number": (nrrd_with(space_directions="(a,0,0) (0,1,0) (0,0,1)"), C.NIFTI_AFFINE),
    "nrrd direction NaN": (nrrd_with(space_directions="(nan,0,0) (0,1,0) (0,0,1)"), C.NIFTI_AFFINE),
    "nrrd singular": (nrrd_with(space_directions="(1,0,0) (0,0,0) (0,0,1)"), C.NIFTI_AFFINE),
    "nrrd in cm": (nrrd_with(space_units='"cm" "cm" "cm"'), C.NIFTI_AFFINE),
    "nrrd sheared": (nrrd_with(space_directions="(1,0,0) (0.3,1,0) (0,0,1)"), C.NIFTI_SHEAR),
    "mha without a matrix": (meta_with(TransformMatrix=None), C.NIFTI_AFFINE),
    "mha without spacing": (meta_with(ElementSpacing=None), C.NIFTI_AFFINE),
    "mha without an offset": (meta_with(Offset=None), C.NIFTI_AFFINE),
    "mha two axes alike": (meta_with(TransformMatrix="1 0 0 1 0 0 0 0 1"), C.NIFTI_SHEAR),
    # the values are none of CT
    "nii NaN": (not_finite("ct.nii", np.nan), C.NIFTI_NONFINITE),
    "gz +inf": (not_finite("ct.nii.gz", np.inf), C.NIFTI_NONFINITE),
    "nii -inf": (not_finite("ct.nii", -np.inf), C.NIFTI_NONFINITE),
    "nrrd NaN": (not_finite("ct.nrrd", np.nan), C.NIFTI_NONFINITE),
    "mha inf": (not_finite("ct.mha", np.inf), C.NIFTI_NONFINITE),
    "nii not rescaled": (nii(values=np.arange(0, 1200, 10, np.int16).reshape(4, 5, 6)), C.HU_IMPLAUSIBLE),
    "gz rescaled twice": (
        nii("ct.nii.gz", values=np.arange(-2048, -848, 10, np.int16).reshape(4, 5, 6)),
        C.HU_IMPLAUSIBLE,
    ),
    "nii constant": (nii(values=np.full((4, 5, 6), 7, np.int16)), C.HU_IMPLAUSIBLE),
    "nii too wide": (nii(values=np.linspace(-1e30, 1e39, 120).reshape(4, 5, 6)), C.HU_IMPLAUSIBLE),
    "nii slope 1e30": (nii_patched(112, floats(1e30)), C.HU_IMPLAUSIBLE),
    "nii slope negative": (nii_patched(112, floats(-1)), C.RESCALE_INVALID),
    "nii slope infinite": (nii_patched(112, floats(np.inf)), C.RESCALE_INVALID),
    "nii intercept NaN": (nii_patched(112, floats(1, np.nan)), C.RESCALE_INVALID),
}
DAMAGE |= {f"nhdr naming {target!r}": (beside(nhdr_naming, target), C.UNSAFE_NAME) for target in ELSEWHERE}
DAMAGE |= {f"mhd naming {target!r}": (beside(mhd_naming, target), C.UNSAFE_NAME) for target in ELSEWHERE}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_its_code(tmp_path, case):
    write, code = DAMAGE[case]
    assert refusal(write(tmp_path)) is code


TOLD_BY_THE_HEADER = ["nii cut by 1", "nii longer", "nrrd cut", "nrrd longer", "mha cut", "mha longer", "mha zlib cut"]
TOLD_BY_THE_HEADER += ["gz claims what it cannot hold", "gz huge", "nii 4-D", "nii codes 0 and 0", "nii sheared"]


@pytest.mark.parametrize("case", TOLD_BY_THE_HEADER)
def test_a_listing_knows_it_from_the_header(tmp_path, case):
    write, code = DAMAGE[case]
    with pytest.raises(ScanError) as caught:
        examine(write(tmp_path))
    assert caught.value.code is code


@pytest.mark.parametrize("base", [nrrd, meta])
def test_the_hand_written_headers_are_good_before_they_are_damaged(tmp_path, base):
    assert_is_phantom(read(base(tmp_path / f"ct.{'nrrd' if base is nrrd else 'mha'}")))
    for name, write in (("ct.nhdr", nhdr_naming), ("ct.mhd", mhd_naming)):
        (tmp_path / "secret.raw").write_bytes(RAW)
        assert_is_phantom(read(write(tmp_path, "secret.raw").parent / name))


def test_the_table_of_damage_is_long_enough():
    assert len(DAMAGE) >= 60  # HAZARDS G18


def test_a_missing_file_is_an_io_error_and_a_pipe_is_not_regular(tmp_path):
    assert refusal(tmp_path / "ct.nii") is C.IO_ERROR
    os.mkfifo(tmp_path / "ct.nrrd")
    assert refusal(tmp_path / "ct.nrrd") is C.NOT_REGULAR


def test_a_gzip_bomb_behind_a_small_header_is_not_inflated(tmp_path, monkeypatch):
    """1 GB of zeros behind the volume: only a block of it is ever looked at."""
    path = nifti(tmp_path / "ct.nii.gz")
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1 << 24)) * 64)
    inflated = []
    readinto = voxels._Inflater.readinto
    monkeypatch.setattr(
        voxels._Inflater, "readinto", lambda self, block: inflated.append(readinto(self, block)) or inflated[-1]
    )
    assert refusal(path) is C.PIXEL_TRUNCATED
    assert sum(inflated) < 5 << 20


# --- damage anywhere: the truth or a coded refusal, never another volume ---------------------------------------------

RANDOM = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
CHECKED = ["both.nii.gz", "packed.nrrd", "packed.mha"]  # formats with a checksum over their voxels


def outcome(path, content):
    path.write_bytes(content)
    try:
        return read(path)
    except ScanError:
        return None


@pytest.mark.parametrize("name", CHECKED)
@RANDOM
@given(data=st.data())
def test_a_flipped_bit_in_a_compressed_stream_is_never_silent(tmp_path, name, data):
    path = WRITERS[name](tmp_path / name, Grid())
    content = bytearray(path.read_bytes())
    first = 0 if name.endswith("gz") else len(content) * 3 // 10  # text headers have no checksum
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(first, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if (scan := outcome(path, content)) is not None:
        np.testing.assert_array_equal(scan.hu, phantom_hu())
        np.testing.assert_allclose(scan.affine, Grid().affine, atol=1e-5)


@pytest.mark.parametrize("name", ["sform.nii", "ct.nrrd", "ct.mha", *CHECKED])
@RANDOM
@given(data=st.data())
def test_no_cut_or_grown_file_is_read(tmp_path, name, data):
    content = WRITERS[name](tmp_path / name, Grid()).read_bytes()
    tail = data.draw(st.one_of(st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=40)))
    assert outcome(tmp_path / name, content[:tail] if isinstance(tail, int) else content + tail) is None


@pytest.mark.parametrize("name", ["sform.nii", "nifti2.nii", "ct.nrrd", "ct.mha", "ct.nhdr", "ct.mhd"])
@RANDOM
@given(data=st.data())
def test_a_damaged_header_ends_in_a_scan_or_a_code(tmp_path, name, data):
    content = bytearray(WRITERS[name](tmp_path / name, Grid()).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    outcome(tmp_path / name, content)


# --- the account of files --------------------------------------------------------------------------------------------


def test_a_slice_that_a_header_names_as_its_pixels_is_one_file(tmp_path):
    pixels = Ct().write(tmp_path)[3]
    nrrd(tmp_path / "ct.nhdr", detached=pixels.name, byte_skip=-1, sizes="24 20 1")
    inventory = scan_folder(tmp_path)
    assert [series.usable for series in inventory.series] == [True, True]
    assert len({entry.path for entry in inventory.files}) == len(inventory.files) == 13


def test_detached_pixels_are_part_of_their_volume_and_not_a_file_of_their_own(tmp_path):
    (tmp_path / "ct.img.gz").write_bytes(gzip.compress(RAW))
    nrrd(tmp_path / "ct.nhdr", detached="ct.img.gz", encoding="gzip")
    inventory = scan_folder(tmp_path)
    (series,) = inventory.series
    assert [(entry.path, entry.outcome) for entry in inventory.files] == [("ct.img.gz", "ok"), ("ct.nhdr", "ok")]
    assert series.shape == read(series).hu.shape == phantom_hu().shape
    (tmp_path / "ct.img.gz").write_bytes(gzip.compress(RAW[::-1]))
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code is C.INCOMPLETE


def test_two_volume_files_are_not_read_as_one(tmp_path):
    nrrd(tmp_path / "a.nrrd")
    nrrd(tmp_path / "b.nrrd")
    with pytest.raises(UsageError, match="one volume file"):
        read_files([tmp_path / "a.nrrd", tmp_path / "b.nrrd"])
