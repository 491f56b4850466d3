"""Other readers' opinion: SimpleITK and dcm2niix on a real series, pydicom and SimpleITK on pydicom's own files.

Compared voxel for voxel in the patient, never by index. Where an oracle differs the test says why; the known-answer
phantom, read by the same oracles, is the judge.
"""

import itertools
import subprocess
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from ct_builder import GRIDS, LEGACY_CONVERTED_CT, Ct, EnhancedCt, phantom_hu
from hazard_cases import MM_TOLERANCE, C, Truth, assert_every_file_is_accounted_for, misfit
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.errors import InvalidDicomError

from medvit.io import read, scan_folder
from medvit.records import AIR_HU, Scan, ScanError

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


# ---- the oracles: files -> HU (Z, Y, X) and affine, voxel (x, y, z) -> LPS mm ---------------------------------------


def by_sitk(paths):
    image = sitk.ReadImage([str(path) for path in paths] if len(paths) > 1 else str(paths[0]))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).astype(float), affine


def by_sitk_series(folder):
    """In the order that GDCM finds, not in ours."""
    (uid,) = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    return by_sitk(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid))


def by_dcm2niix(folder, output):
    """The one image that dcm2niix makes of a folder."""
    binary = pytest.importorskip("dcm2niix", reason="dcm2niix is not installed").bin
    output.mkdir()
    command = [binary, "-z", "n", "-b", "n", "-f", "converted", "-o", str(output), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (converted,) = output.glob("*.nii")
    image = nibabel.load(converted)
    return np.asarray(image.dataobj, float).transpose(2, 1, 0), RAS_TO_LPS @ image.affine


def by_highdicom(path):
    """Whole multi-frame objects, by a reader that knows functional groups."""
    volume = pytest.importorskip("highdicom", reason="highdicom is not installed").imread(path).get_volume()
    affine = np.asarray(volume.affine) @ np.eye(4)[[2, 1, 0, 3]]  # its axes are (slice, row, column)
    return np.asarray(volume.array, float), affine


def largest_difference(scan, hu, affine):
    """HU between a scan and an oracle at the same points of the patient, padding aside; their axes may differ."""
    between = np.linalg.inv(affine) @ scan.affine  # our voxel (x, y, z) -> the oracle's
    axes, signs = np.abs(between[:3, :3]).argmax(axis=0), np.sign(between[:3, :3])
    same = hu.transpose(2, 1, 0).transpose(axes)  # (X, Y, Z)
    for axis in range(3):
        if signs[axes[axis], axis] < 0:
            same = np.flip(same, axis)
    same = same.transpose(2, 1, 0)
    assert same.shape == scan.hu.shape
    corners = np.array(list(itertools.product(*((0, size - 1) for size in scan.hu.shape[::-1]))))
    place = corners @ between[:3, :3].T + between[:3, 3]
    ends = np.where(place > (np.array(hu.shape[::-1]) - 1) / 2, np.array(hu.shape[::-1]) - 1, 0)
    assert np.linalg.norm((place - ends) @ affine[:3, :3].T, axis=1).max() < MM_TOLERANCE
    difference = np.abs(scan.hu - same)
    if C.PADDING_APPLIED in scan.codes:  # no oracle replaces padding by air
        difference[scan.hu == AIR_HU] = 0
    return difference.max()


# ---- the judge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GRIDS)
def test_the_phantom_is_what_oracles_say_it_is(tmp_path, geometry):
    """Else an error of the builder and one of the reader could cancel."""
    grid = GRIDS[geometry]
    Ct(grid=grid).write(tmp_path / "ct")
    for hu, affine in (by_sitk_series(tmp_path / "ct"), by_dcm2niix(tmp_path / "ct", tmp_path / "nii")):
        assert misfit(Scan(hu=hu.astype(np.float32), affine=affine), Truth(grid)) == ""


@pytest.mark.parametrize("geometry", GRIDS)
@pytest.mark.parametrize("sop_class", [None, LEGACY_CONVERTED_CT], ids=["enhanced", "legacy converted"])
def test_the_multi_frame_phantom_is_what_oracles_say_it_is(tmp_path, geometry, sop_class):
    grid = GRIDS[geometry]
    settings = {} if sop_class is None else {"sop_class": sop_class, "shared": ()}
    path = EnhancedCt(Ct(grid=grid), frames=(7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6), **settings).write(tmp_path / "ct")
    hu, affine = by_highdicom(path)
    assert misfit(Scan(hu=hu.astype(np.float32), affine=affine), Truth(grid)) == ""


def test_the_comparison_sees_what_differs():
    hu, affine = phantom_hu().astype(np.float32), GRIDS["oblique"].affine
    scan = Scan(hu=hu, affine=affine)
    turned = affine.copy()
    turned[:3, 3] += turned[:3, 2] * 11
    turned[:3, 2] *= -1
    assert largest_difference(scan, hu[::-1], turned) == 0
    assert largest_difference(scan, hu[:, :, ::-1], affine) > 100
    moved = affine.copy()
    moved[:3, 3] += (0.2, 0, 0)
    with pytest.raises(AssertionError):
        largest_difference(scan, hu, moved)
    with pytest.raises(AssertionError):
        largest_difference(scan, hu, affine @ np.diag([1.01, 1, 1, 1]))


# ---- a real series --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_volume(real_data):
    folder = real_data / "pet_ct_volume"
    inventory = scan_folder(folder)
    assert_every_file_is_accounted_for(inventory, folder)
    (series,) = [one for one in inventory.series if one.usable]
    return read(series), folder / Path(series.files[0]).parent


@pytest.mark.realdata
def test_a_real_series_is_what_simpleitk_reads(real_volume):
    scan, folder = real_volume
    assert scan.hu.shape[0] == 174
    assert largest_difference(scan, *by_sitk_series(folder)) <= 1


@pytest.mark.realdata
def test_a_real_series_is_what_dcm2niix_reads(real_volume, tmp_path):
    scan, folder = real_volume
    assert largest_difference(scan, *by_dcm2niix(folder, tmp_path / "nii")) <= 1


@pytest.mark.realdata
def test_real_localizers_are_no_volume(real_data):
    folder = real_data / "pet_ct_volume"
    codes = [entry.code for entry in scan_folder(folder).files]
    assert codes.count(C.NOT_VOLUME) == 2


# ---- pydicom's bundled files ----------------------------------------------------------------------------------------

BUNDLED = Path(get_testdata_file("CT_small.dcm")).parent
CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")


def is_ct(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several are broken on purpose
            dataset = dcmread(path, specific_tags=["SOPClassUID"], stop_before_pixels=True)
        return dataset.get("SOPClassUID") in CT_CLASSES
    except (InvalidDicomError, OSError):
        return False


@pytest.fixture(scope="module")
def bundled_ct():
    return sorted(path.relative_to(BUNDLED).as_posix() for path in BUNDLED.rglob("*") if path.is_file() and is_ct(path))


READ = {
    "693_J2KI.dcm": {C.LOSSY, C.PADDING_APPLIED},  # padding -2000 under slope 1, intercept -1024: -3024 HU elsewhere
    "CT_small.dcm": set(),
    "dicomdirtests/77654033/CT2/17106": set(),
    "dicomdirtests/77654033/CT2/17136": set(),
    "dicomdirtests/77654033/CT2/17166": set(),
    "dicomdirtests/77654033/CT2/17196": set(),
    "dicomdirtests/98892001/CT5N/2062": set(),
    "dicomdirtests/98892001/CT5N/2392": set(),
    "dicomdirtests/98892001/CT5N/2693": set(),
    "dicomdirtests/98892001/CT5N/3023": set(),
    "dicomdirtests/98892001/CT5N/3353": set(),
}
REFUSED = {
    "dicomdirtests/98892001/CT2N/6293": {C.NOT_VOLUME},  # localizers, which oracles read as any picture
    "dicomdirtests/98892001/CT2N/6924": {C.NOT_VOLUME},
}
SIGN_IN_DOUBT = "J2K_pixelrep_mismatch.dcm"
"""Signed by its header, unsigned by its codestream: oracles correct it silently. See test_hazards_values.py."""
MAY_BE_REFUSED = {
    SIGN_IN_DOUBT: C.PIXELREP_CONFLICT,
    # 16 x 16 pixels cut out of bone, without any air: as if they were not rescaled
    "dicomdirtests/77654033/CT2/17136": C.HU_IMPLAUSIBLE,
    "dicomdirtests/77654033/CT2/17166": C.HU_IMPLAUSIBLE,
    "dicomdirtests/77654033/CT2/17196": C.HU_IMPLAUSIBLE,
}
"""Refusing these is right too."""
WITHOUT_PIXELS = "dicomdirtests/TINY_ALPHA/"
"""50 headers without rows, columns and pixels."""


def test_each_bundled_ct_file_is_known_to_these_tests(bundled_ct):
    known = {*READ, *REFUSED, SIGN_IN_DOUBT}
    unknown = [name for name in bundled_ct if name not in known and not name.startswith(WITHOUT_PIXELS)]
    assert unknown == []
    assert known <= set(bundled_ct)


@pytest.mark.parametrize("name", [*READ, SIGN_IN_DOUBT])
def test_bundled_slices_are_what_pydicom_and_simpleitk_read(name):
    path = BUNDLED / name
    try:
        scan = read(path)
    except ScanError as error:
        if error.code is not MAY_BE_REFUSED.get(name):
            raise
        return
    dataset = dcmread(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the sign in doubt
        hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    judged = scan.hu[0] != AIR_HU if C.PADDING_APPLIED in scan.codes else np.ones(hu.shape, bool)
    np.testing.assert_array_equal(scan.hu[0][judged], hu[judged])
    assert judged.mean() > 0.7
    assert largest_difference(scan, *_placed(*by_sitk([path]), scan)) <= 1
    assert set(scan.codes) - {C.PIXELREP_CONFLICT} == READ.get(name, set())


def _placed(hu, affine, scan):
    """SimpleITK takes 1 mm between slices where there is one slice only: nothing to compare."""
    affine = affine.copy()
    affine[:3, 2] = scan.affine[:3, 2]
    return hu, affine


@pytest.mark.parametrize("name", REFUSED)
def test_bundled_localizers_are_refused(name):
    with pytest.raises(ScanError) as caught:
        read(BUNDLED / name)
    assert caught.value.code in REFUSED[name]


def test_a_bundled_series_is_what_simpleitk_and_dcm2niix_read(tmp_path):
    folder = BUNDLED / "dicomdirtests" / "98892001" / "CT5N"
    scan = read(folder)
    assert scan.hu.shape == (5, 16, 16)
    assert largest_difference(scan, *by_sitk_series(folder)) <= 1
    assert largest_difference(scan, *by_dcm2niix(folder, tmp_path / "nii")) <= 1


def test_a_bundled_series_with_a_gap_is_refused_where_oracles_stretch_it():
    """Three slices 1.25 mm apart and one 202.5 mm below; SimpleITK makes four slices 68.3 mm apart of it."""
    folder = BUNDLED / "dicomdirtests" / "77654033" / "CT2"
    (series,) = scan_folder(folder).series
    assert series.codes[0] in (C.SLICE_MISSING, C.SPACING_NONUNIFORM)
    hu, affine = by_sitk_series(folder)
    assert (len(hu), round(float(np.linalg.norm(affine[:3, 2])), 1)) == (4, 68.3)


def test_bundled_headers_without_pixels_are_refused_each():
    folder = BUNDLED / WITHOUT_PIXELS
    inventory = scan_folder(folder)
    assert_every_file_is_accounted_for(inventory, folder)
    assert not [series for series in inventory.series if series.usable]
    bad = [entry for entry in inventory.files if entry.outcome.bad and entry.path.startswith("PT000000")]
    assert len(bad) == 50


def test_all_bundled_files_are_accounted_for():
    inventory = scan_folder(BUNDLED)
    assert_every_file_is_accounted_for(inventory, BUNDLED)
    for series in inventory.series:
        if series.usable:
            assert read(series).hu.shape == series.shape
