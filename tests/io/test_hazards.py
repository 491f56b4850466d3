"""The hazards on which other readers are silently wrong: medvit is right, or says by name why it sets them aside.

First the 25 cases on which five readers were measured, then nine of a second comparison; each on the known-answer
phantom in several geometries and transfer syntaxes. A case writes a folder and returns what must become of it.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from ct_builder import GRIDS, SLICES, Ct, both, change, phantom_hu
from hazard_cases import (
    ALL_GEOMETRIES,
    GEOMETRIES,
    SYNTAXES,
    C,
    Expected,
    Truth,
    across,
    assert_never_silently_wrong,
    ct_on,
    refused,
    right,
)
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from medvit.records import AIR_HU

SHUFFLE = (7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6)
LATER = phantom_hu() + 25
"""A second phase: the same anatomy, brighter by contrast medium."""


# ---- 25 cases, five readers -----------------------------------------------------------------------------------------


def number_reversed(folder: Path, ct: Ct) -> Expected:
    ct.but(edit=change(InstanceNumber=lambda index: SLICES - index)).write(folder)
    return right(ct)


def number_shuffled(folder: Path, ct: Ct) -> Expected:
    ct.but(edit=change(InstanceNumber=lambda index: SHUFFLE[index])).write(folder)
    return right(ct)


def number_absent(folder: Path, ct: Ct) -> Expected:
    ct.but(edit=change(InstanceNumber=None)).write(folder)
    return right(ct)


def number_all_equal(folder: Path, ct: Ct) -> Expected:
    ct.but(edit=change(InstanceNumber=1)).write(folder)
    return right(ct)


def rescale_per_slice(folder: Path, ct: Ct) -> Expected:
    ct.but(slopes=(1.0, 0.5, 0.25), bits_stored=16).write(folder)
    return right(ct)


def rescale_absent(folder: Path, ct: Ct) -> Expected:
    ct.but(damage=change(RescaleSlope=None, RescaleIntercept=None, RescaleType=None)).write(folder)
    return refused(C.RESCALE_MISSING)


def slope_zero(folder: Path, ct: Ct) -> Expected:
    ct.but(damage=change(RescaleSlope=0)).write(folder)
    return refused(C.RESCALE_INVALID)


def slice_missing(folder: Path, ct: Ct) -> Expected:
    ct.write(folder, only=[index for index in range(SLICES) if index != 5])
    return refused(C.SLICE_MISSING, SLICES - 1)


def duplicate_file(folder: Path, ct: Ct) -> Expected:
    paths = ct.write(folder)
    shutil.copy(paths[4], folder / "copy.dcm")
    return right(ct, aside={C.DUP_IDENTICAL: 1})


def duplicate_position(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    ct.but(hu=LATER, edit=change(SOPInstanceUID="1.2.3.4", InstanceNumber=99)).write(folder, "second{}", only=[4])
    return refused(C.DUP_POSITION, SLICES + 1)


def localizer_in_series(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    scout = change(
        SOPInstanceUID="1.2.3.4",
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=across(ct.grid),
    )
    ct.but(edit=scout).write(folder, "AAA{}", only=[0])
    return right(ct, aside={C.NOT_VOLUME: 1})


def two_series(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    other = ct.but(uid=2, hu=LATER, grid=ct.grid.moved(0.3, 1.0, 1.25))
    other.write(folder, "B{}")
    return Expected((Truth(ct.grid), Truth(other.grid, LATER)))


def gantry_tilt(folder: Path, ct: Ct) -> Expected:
    tilted = ct.but(grid=ct.grid.tilted(15))
    tilted.write(folder)
    return right(tilted, C.GANTRY_TILT, straightened=True)


def monochrome1(folder: Path, ct: Ct) -> Expected:
    ct.but(damage=change(PhotometricInterpretation="MONOCHROME1")).write(folder)
    return right(ct, C.MONO1)


def prone(folder: Path, ct: Ct) -> Expected:
    turned = ct.but(grid=GRIDS["prone"])
    turned.write(folder)
    return right(turned)


def one_slice_truncated(folder: Path, ct: Ct) -> Expected:
    path = ct.write(folder)[7]
    path.write_bytes(path.read_bytes()[:-150])
    return refused(C.PIXEL_TRUNCATED)


def one_slice_without_preamble(folder: Path, ct: Ct) -> Expected:
    path = ct.but(transfer_syntax=ExplicitVRLittleEndian).write(folder)[7]
    raw = path.read_bytes()
    meta_end = 132 + 12 + int.from_bytes(raw[140:144], "little")  # behind the group length element
    path.write_bytes(raw[meta_end:])
    return right(ct, C.NO_PREAMBLE)


def padding(folder: Path, ct: Ct) -> Expected:
    outside, filled = phantom_hu(), phantom_hu()
    outside[:, :3, :4], filled[:, :3, :4] = -2000 - 1024, AIR_HU
    padded = change(vr="SS", PixelPaddingValue=-2000)
    ct.but(hu=outside, signed=True, bits_stored=16, edit=padded).write(folder)
    return right(ct, C.PADDING_APPLIED, hu=filled)


def matrix_lie(folder: Path, ct: Ct) -> Expected:
    ct.but(damage=change(Rows=65535, Columns=65535)).write(folder)
    return refused(C.RESOURCE_LIMIT)


def spacing_not_uniform(folder: Path, ct: Ct) -> Expected:
    shift = ct.grid.affine[:3, 2] * 0.36  # 0.9 mm
    ct.but(edit=change(range(7, 12), ImagePositionPatient=lambda index: _moved(ct, index, shift))).write(folder)
    return refused(C.SPACING_NONUNIFORM)


def garbage_beside(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    (folder / "IM9999.dcm").write_bytes(bytes(range(256)) * 40)
    return right(ct, aside={C.NOT_DICOM: 1})


def colour_capture_in_series(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    colour = change(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.7",
        SOPInstanceUID="1.2.3.4",
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelData=bytes(20 * 24 * 3),
    )
    ct.but(transfer_syntax=ExplicitVRLittleEndian, edit=colour).write(folder, "RGB{}", only=[0])
    return right(ct, aside={(C.NOT_VOLUME, C.PHOTOMETRIC): 1})


def two_phases(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    ct.but(hu=LATER, edit=both(_other_instances, change(AcquisitionNumber=2))).write(folder, "B{}")
    split = frozenset({C.MULTIPHASE})
    return Expected((Truth(ct.grid, codes=split), Truth(ct.grid, LATER, codes=split)))


def one_slice_of_another_matrix(folder: Path, ct: Ct) -> Expected:
    ct.write(folder, only=range(SLICES - 1))
    larger = np.pad(phantom_hu(), ((0, 0), (0, 2), (0, 0)), mode="edge")
    ct.but(hu=larger).write(folder, only=[SLICES - 1])
    return refused(C.MATRIX_MISMATCH)


def empty_file(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)[6].write_bytes(b"")
    return Expected(aside={C.SLICE_MISSING: SLICES - 1, (C.NOT_DICOM, C.INCOMPLETE): 1})


FIVE_READERS = [
    number_reversed,
    number_shuffled,
    number_absent,
    number_all_equal,
    rescale_per_slice,
    rescale_absent,
    slope_zero,
    slice_missing,
    duplicate_file,
    duplicate_position,
    localizer_in_series,
    two_series,
    gantry_tilt,
    monochrome1,
    prone,
    one_slice_truncated,
    one_slice_without_preamble,
    padding,
    matrix_lie,
    spacing_not_uniform,
    garbage_beside,
    colour_capture_in_series,
    two_phases,
    one_slice_of_another_matrix,
    empty_file,
]


# ---- nine cases, four readers ---------------------------------------------------------------------------------------


def a_clean(folder: Path, ct: Ct) -> Expected:
    ct.write(folder)
    return right(ct)


def b_one_slice_missing(folder: Path, ct: Ct) -> Expected:
    ct.write(folder, only=[index for index in range(SLICES) if index != 9])
    return refused(C.SLICE_MISSING, SLICES - 1)


def c_two_series_of_other_spacing(folder: Path, ct: Ct) -> Expected:
    thick = ct.but(uid=2, grid=ct.grid.thinned(2), hu=phantom_hu(6) + 25, edit=change(SliceThickness=5.0))
    ct.write(folder)
    thick.write(folder, "B{}")
    return Expected((Truth(ct.grid), Truth(thick.grid, thick.hu)))


def d_gantry_tilt_the_other_way(folder: Path, ct: Ct) -> Expected:
    tilted = ct.but(grid=ct.grid.tilted(-15))
    tilted.write(folder)
    return right(tilted, C.GANTRY_TILT, straightened=True)


def e_number_scrambled(folder: Path, ct: Ct) -> Expected:
    ct.but(edit=change(InstanceNumber=lambda index: index * 7 % 12 + 1)).write(folder)
    return right(ct)


def f_every_position_twice(folder: Path, ct: Ct) -> Expected:
    """Sent again under new UIDs: nothing tells which is meant."""
    ct.write(folder)
    ct.but(hu=LATER, edit=_other_instances).write(folder, "B{}")
    return refused(C.DUP_POSITION, 2 * SLICES)


def g_localizer_that_calls_itself_axial(folder: Path, ct: Ct) -> Expected:
    """Only its direction tells."""
    ct.write(folder)
    scout = change(SOPInstanceUID="1.2.3.4", ImageOrientationPatient=across(ct.grid))
    ct.but(edit=scout).write(folder, "AAA{}", only=[0])
    return right(ct, aside={C.NOT_VOLUME: 1})


def h_number_empty(folder: Path, ct: Ct) -> Expected:
    ct.but(edit=change(InstanceNumber="")).write(folder)
    return right(ct)


def i_coronal(folder: Path, ct: Ct) -> Expected:
    coronal = ct.but(grid=GRIDS["coronal"])
    coronal.write(folder)
    return right(coronal)


FOUR_READERS = [
    a_clean,
    b_one_slice_missing,
    c_two_series_of_other_spacing,
    d_gantry_tilt_the_other_way,
    e_number_scrambled,
    f_every_position_twice,
    g_localizer_that_calls_itself_axial,
    h_number_empty,
    i_coronal,
]
HAZARDS = FIVE_READERS + FOUR_READERS


def _other_instances(dataset, index):
    dataset.SOPInstanceUID = f"{dataset.SeriesInstanceUID}.{100 + index}"


def _moved(ct: Ct, index: int, by_mm: np.ndarray) -> list[float]:
    place = ct.grid.affine[:3, 3] + ct.grid.affine[:3, 2] * index + by_mm
    return [float(f"{value:.8f}") for value in place]


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.__name__)
@pytest.mark.parametrize(
    ("geometry", "syntax"), list(zip(GEOMETRIES, (*SYNTAXES, RLELossless), strict=True)), ids=GEOMETRIES
)
def test_never_silently_wrong(tmp_path, hazard, geometry, syntax):
    assert_never_silently_wrong(tmp_path, hazard(tmp_path, ct_on(geometry, syntax)))


@pytest.mark.slow
@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.__name__)
@pytest.mark.parametrize("geometry", ALL_GEOMETRIES)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_never_silently_wrong_in_any_geometry(tmp_path, hazard, geometry, syntax):
    assert_never_silently_wrong(tmp_path, hazard(tmp_path, ct_on(geometry, syntax)))
