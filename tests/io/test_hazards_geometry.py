"""Where slices lie: tilt, gaps, repeated positions, phases, several volumes in one series, orientation."""

import shutil

import numpy as np
import pytest
from ct_builder import SLICES, Ct, Grid, both, change, phantom_hu
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

from medvit.io import read, scan_folder

LATER = phantom_hu() + 25
"""A second phase or reconstruction: the same anatomy with other values."""
SPLIT = frozenset({C.MULTIPHASE})
TILTS = [(15, "row"), (-15, "row"), (9, "column"), (-9, "column"), (24, "row")]


def other_instances(dataset, index):
    dataset.SOPInstanceUID = f"{dataset.SeriesInstanceUID}.{100 + index}"


def place(grid, index, *by_mm):
    """ImagePositionPatient of a slice, moved by so many mm in the patient."""
    position = grid.affine[:3, 3] + grid.affine[:3, 2] * index + np.array(by_mm or (0, 0, 0))
    return [float(f"{value:.8f}") for value in position]


def shifted(grid, steps):
    """An edit that moves slice `index` by `steps[index]` slice distances along the stack."""
    return change(ImagePositionPatient=lambda index: place(grid, index, *grid.affine[:3, 2] * steps[index]))


# ---- gantry tilt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("tilt", TILTS, ids=str)
def test_a_tilted_gantry_is_straightened_and_nothing_is_cut(tmp_path, geometry, tilt):
    ct = ct_on(geometry)
    ct = ct.but(grid=ct.grid.tilted(*tilt))
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct, C.GANTRY_TILT, straightened=True))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ALL_GEOMETRIES)
@pytest.mark.parametrize("tilt", TILTS, ids=str)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_tilted_gantry_is_straightened_in_any_geometry(tmp_path, geometry, tilt, syntax):
    ct = ct_on(geometry, syntax)
    ct = ct.but(grid=ct.grid.tilted(*tilt))
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct, C.GANTRY_TILT, straightened=True))


def test_tilt_about_both_axes_at_once(tmp_path):
    ct = Ct(grid=Grid().tilted(12, "row").tilted(-7, "column"))
    ct.write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct, C.GANTRY_TILT, straightened=True))


@pytest.mark.parametrize("degrees", [15, -20])
def test_the_tilt_tag_is_not_believed(tmp_path, degrees):
    """GantryDetectorTilt is 'not intended for mathematical computations'; positions alone decide."""
    Ct(edit=change(GantryDetectorTilt=degrees)).write(tmp_path / "straight")
    assert_never_silently_wrong(tmp_path / "straight", right(Ct()))
    tilted = Ct(grid=Grid().tilted(15), edit=change(GantryDetectorTilt=0))
    tilted.write(tmp_path / "tilted")
    assert_never_silently_wrong(tmp_path / "tilted", right(tilted, C.GANTRY_TILT, straightened=True))


def test_padding_does_not_bleed_into_a_straightened_volume(tmp_path):
    """-2000 beside tissue would interpolate to values that neither has."""
    hu = phantom_hu()
    hu[:, :5] = -3024
    ct = Ct(
        grid=Grid().tilted(15),
        hu=hu,
        signed=True,
        bits_stored=16,
        edit=change(vr="SS", PixelPaddingValue=-2000),
    )
    ct.write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    scan = read(series)
    assert C.GANTRY_TILT in scan.codes
    assert scan.hu.min() >= -1024.5


# ---- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("missing", [(1,), (5,), (10,), (5, 6), (3, 8), (4, 5, 6, 7)], ids=str)
def test_a_gap_is_refused_wherever_it_is(tmp_path, geometry, missing):
    kept = [index for index in range(SLICES) if index not in missing]
    ct_on(geometry).write(tmp_path, only=kept)
    assert_never_silently_wrong(tmp_path, refused(C.SLICE_MISSING, len(kept)))


@pytest.mark.parametrize("step_mm", [0.125, 0.15, 0.2, 0.25])
@pytest.mark.parametrize("missing", [1, 5, 6, 10])
def test_a_gap_between_thin_slices_is_refused(tmp_path, step_mm, missing):
    """Cone beam CT: a missing slice moves none of the others further than positions are rounded elsewhere."""
    ct = Ct(grid=Grid(step=(0, 0, step_mm)), edit=change(SliceThickness=step_mm))
    ct.write(tmp_path / "whole")
    assert_never_silently_wrong(tmp_path / "whole", right(ct))
    ct.write(tmp_path / "gap", only=[index for index in range(SLICES) if index != missing])
    assert_never_silently_wrong(tmp_path / "gap", refused(C.SLICE_MISSING, SLICES - 1))


@pytest.mark.parametrize("end", [0, 11])
def test_a_stack_that_ends_earlier_is_a_shorter_volume(tmp_path, end):
    """Nobody can tell; what comes out is right where it is."""
    kept = [index for index in range(SLICES) if index != end]
    Ct().write(tmp_path, only=kept)
    first = Grid() if end else Grid().moved(0, 0, 2.5)
    assert_never_silently_wrong(tmp_path, right(Ct(grid=first), hu=phantom_hu()[kept]))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("every", [2, 3])
def test_every_other_slice_missing_is_flagged(tmp_path, geometry, every):
    """Regular, so it is a volume; but farther apart than thick."""
    ct = ct_on(geometry)
    ct.write(tmp_path, only=range(0, SLICES, every))
    kept = ct.but(grid=ct.grid.thinned(every), hu=phantom_hu()[::every])
    assert_never_silently_wrong(tmp_path, right(kept, C.SLICE_GAPS))


@pytest.mark.parametrize("thickness", [1.7, 2.5, 3.0, 5.0, None, ""])
def test_overlapping_slices_and_small_gaps_are_no_fault(tmp_path, thickness):
    Ct(edit=change(SliceThickness=thickness)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


UNEVEN = {
    "from the seventh on": [0] * 7 + [0.36] * 5,
    "one slice": [0] * 6 + [0.24] + [0] * 5,
    "the last slice": [0] * 11 + [0.4],
    "growing": [0.02 * index**2 for index in range(SLICES)],
    "irregular": [0, 0.1, -0.2, 0.15, 0.3, -0.1, 0, 0.25, -0.3, 0.1, 0.2, 0],
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_distances_are_refused(tmp_path, geometry, name):
    ct = ct_on(geometry)
    ct.but(edit=shifted(ct.grid, UNEVEN[name])).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.SPACING_NONUNIFORM))


def test_a_spacing_that_doubles_half_way_is_refused(tmp_path):
    Ct(edit=shifted(Grid(), [max(0, index - 6) for index in range(SLICES)])).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused((C.SPACING_NONUNIFORM, C.SLICE_MISSING)))


def test_a_slice_moved_sideways_is_refused(tmp_path):
    Ct(edit=change(6, ImagePositionPatient=lambda index: place(Grid(), index, 3, 0, 0))).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.SPACING_NONUNIFORM))


@pytest.mark.parametrize("decimals", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rounded_positions_are_no_fault(tmp_path, geometry, decimals):
    ct = ct_on(geometry)
    rounded = change(ImagePositionPatient=lambda index: [round(value, decimals) for value in place(ct.grid, index)])
    ct.but(edit=rounded).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


def test_wrong_slice_location_and_spacing_tags_change_nothing(tmp_path):
    lies = change(SliceLocation=lambda index: -3.0 * index, SpacingBetweenSlices=7.5, InstanceNumber=1)
    Ct(edit=lies).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


# ---- repeated positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 12])
def test_identical_copies_under_other_names_are_counted(tmp_path, count):
    for path in Ct().write(tmp_path)[:count]:
        (tmp_path / "again").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "again" / f"{path.stem}.IMA")
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.DUP_IDENTICAL: count}))


@pytest.mark.parametrize("change_of", ["pixels", "header"])
def test_one_instance_uid_for_two_contents_is_refused(tmp_path, change_of):
    Ct().write(tmp_path)
    other = Ct(hu=LATER) if change_of == "pixels" else Ct(edit=change(WindowCenter=40))
    other.write(tmp_path, "again{}", only=[4])
    assert_never_silently_wrong(tmp_path, refused(C.DUP_CONFLICT, SLICES + 1))


def test_one_instance_uid_in_two_series_refuses_both_and_no_third(tmp_path):
    Ct().write(tmp_path, "a{}")
    borrowed = change(3, SOPInstanceUID=Ct().dataset(8).SOPInstanceUID)
    Ct(uid=2, hu=LATER, edit=borrowed).write(tmp_path, "b{}")
    third = Ct(uid=3, study=2)
    third.write(tmp_path, "c{}")
    assert_never_silently_wrong(tmp_path, right(third, aside={C.DUP_CONFLICT: 2 * SLICES}))


@pytest.mark.parametrize("repeated", [[4], [0], [11], [2, 3, 4], range(SLICES)], ids=str)
def test_positions_that_repeat_without_a_reason_are_refused(tmp_path, repeated):
    Ct().write(tmp_path)
    Ct(hu=LATER, edit=other_instances).write(tmp_path, "again{}", only=repeated)
    assert_never_silently_wrong(tmp_path, refused(C.DUP_POSITION, SLICES + len(repeated)))


PHASES = {
    "acquisition": lambda n: {"AcquisitionNumber": n + 1},
    "temporal position": lambda n: {"TemporalPositionIdentifier": n + 1, "NumberOfTemporalPositions": 2},
    "content time": lambda n: {"ContentTime": f"10{n}000.500"},
    "acquisition time": lambda n: {"AcquisitionTime": f"10{n}000"},
    "kernel": lambda n: {"ConvolutionKernel": f"B{3 + 3 * n}0f"},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("by", PHASES)
def test_two_phases_of_one_series_are_two_volumes(tmp_path, geometry, by):
    ct = ct_on(geometry)
    ct.but(edit=change(**PHASES[by](0))).write(tmp_path)
    ct.but(hu=LATER, edit=both(other_instances, change(**PHASES[by](1)))).write(tmp_path, "B{}")
    both_phases = Expected((Truth(ct.grid, codes=SPLIT), Truth(ct.grid, LATER, codes=SPLIT)))
    scans = assert_never_silently_wrong(tmp_path, both_phases)
    assert len({scan.header.phase for scan in scans} - {""}) == 2
    assert len({scan.header.series_uid for scan in scans}) == 1
    if by in ("kernel", "acquisition"):
        value = {"kernel": ("kernel B30f", "kernel B60f"), "acquisition": ("acquisition 1", "acquisition 2")}[by]
        assert {scan.header.phase for scan in scans} == set(value)


def test_three_phases_are_three_volumes_in_a_stable_order(tmp_path):
    for n in range(3):
        edit = both(lambda d, i, n=n: setattr(d, "SOPInstanceUID", f"1.2.3.{n}.{i}"), change(AcquisitionNumber=n + 1))
        Ct(hu=phantom_hu() + 20 * n, edit=edit).write(tmp_path, f"{2 - n}_{{}}")
    scans = assert_never_silently_wrong(
        tmp_path, Expected(tuple(Truth(Grid(), phantom_hu() + 20 * n, codes=SPLIT) for n in range(3)))
    )
    assert [scan.header.phase for scan in scans] == ["acquisition 1", "acquisition 2", "acquisition 3"]
    assert [series.part for series in scan_folder(tmp_path).series] == [0, 1, 2]


def test_a_time_that_runs_on_from_slice_to_slice_still_tells_phases_apart_or_is_refused(tmp_path):
    times = [lambda i, m=m: f"10{m:02}{i:02}.250" for m in (0, 5)]
    Ct(edit=change(ContentTime=times[0])).write(tmp_path)
    Ct(hu=LATER, edit=both(other_instances, change(ContentTime=times[1]))).write(tmp_path, "B{}")
    phases = Expected((Truth(Grid(), codes=SPLIT), Truth(Grid(), LATER, codes=SPLIT)))
    assert_never_silently_wrong(tmp_path, phases, refused((C.DUP_POSITION, C.MULTIPHASE), 2 * SLICES))


def test_a_phase_with_a_gap_does_not_spoil_the_other(tmp_path):
    Ct().write(tmp_path)
    kept = [index for index in range(SLICES) if index != 6]
    edit = both(other_instances, change(AcquisitionNumber=2))
    Ct(hu=LATER, edit=edit).write(tmp_path, "B{}", only=kept)
    assert_never_silently_wrong(
        tmp_path,
        right(Ct(), C.MULTIPHASE, aside={C.SLICE_MISSING: SLICES - 1}),
        refused((C.SLICE_MISSING, C.MULTIPHASE, C.DUP_POSITION), 2 * SLICES - 1),
    )


VARYING = {
    "acquisition": change(AcquisitionNumber=lambda index: index + 1),
    "acquisition, in two blocks": change(AcquisitionNumber=lambda index: index // 6),
    "content time": change(ContentTime=lambda index: f"1000{index:02}"),
    "acquisition time": change(AcquisitionTime=lambda index: f"1000{index // 4:02}"),
    "temporal position": change(TemporalPositionIdentifier=lambda index: index // 6 + 1),
    "tube current": change(XRayTubeCurrent=lambda index: 100 + index),
    "window": change(WindowCenter=lambda index: 40 + index, WindowWidth=400),
    "image type": change(3, ImageType=["DERIVED", "PRIMARY", "AXIAL"]),
}


@pytest.mark.parametrize("name", VARYING)
def test_what_varies_along_one_stack_does_not_split_it(tmp_path, name):
    Ct(edit=VARYING[name]).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))


# ---- several volumes under one series -------------------------------------------------------------------------------


MIXED = {
    "orientation": lambda: Ct(grid=Grid(row=(1, 0, 0), column=(0, 0, -1))),
    "frame of reference": lambda: Ct(edit=change(FrameOfReferenceUID="1.2.77")),
    "larger matrix": lambda: Ct(hu=np.pad(LATER, ((0, 0), (0, 4), (0, 4)), mode="edge")),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_whole_volumes_in_one_series_are_two(tmp_path, name):
    other = MIXED[name]()
    other = other.but(edit=both(other_instances, other.edit or (lambda dataset, index: None)))
    Ct().write(tmp_path)
    other.write(tmp_path, "B{}")
    truths = (Truth(Grid(), may=SPLIT), Truth(other.grid, other.hu, may=SPLIT))
    assert_never_silently_wrong(tmp_path, Expected(truths))


@pytest.mark.parametrize("at", [[0], [6], [11], [3, 7], range(6)], ids=str)
@pytest.mark.parametrize("tags", [{"PixelSpacing": [0.7, 0.8]}, {"PixelSpacing": [0.35, 0.45]}], ids=str)
def test_slices_of_another_spacing_refuse_the_series(tmp_path, at, tags):
    Ct(edit=change(at, **tags)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.MATRIX_MISMATCH))


@pytest.mark.parametrize("at", [[0], [5, 6]], ids=str)
def test_slices_of_another_frame_of_reference_are_never_mixed_in(tmp_path, at):
    """What is left without them may be a volume, or has a gap."""
    Ct(edit=change(at, FrameOfReferenceUID="1.2.77")).write(tmp_path)
    kept = [index for index in range(SLICES) if index not in at]
    split = Expected(
        (
            Truth(Grid().moved(0, 0, 2.5), phantom_hu()[1:], may=SPLIT),
            Truth(Grid(), phantom_hu()[:1], may=SPLIT),
        )
    )
    gap = Expected((Truth(Grid().moved(0, 0, 12.5), phantom_hu()[5:7], may=SPLIT),), {C.SLICE_MISSING: len(kept)})
    anyhow = refused((C.ORIENTATION_INVALID, C.MATRIX_MISMATCH, C.SLICE_MISSING))
    assert_never_silently_wrong(tmp_path, split if at == [0] else gap, anyhow)


def test_files_of_many_series_in_one_heap_are_sorted_out(tmp_path):
    """Three studies, shuffled over folders that mean nothing."""
    truths = []
    for number, geometry in enumerate(GEOMETRIES):
        ct = ct_on(geometry, study=number + 1, uid=7, hu=phantom_hu() + 10 * number)
        for index in range(SLICES):
            ct.write(tmp_path / f"{index * 5 % 3}", f"{number}_{{}}", only=[index])
        truths.append(Truth(ct.grid, ct.hu))
    assert_never_silently_wrong(tmp_path, Expected(tuple(truths)))


def test_one_series_uid_in_two_studies_is_two_series(tmp_path):
    Ct().write(tmp_path, "a{}")
    uids = change(StudyInstanceUID="1.2.5", SOPInstanceUID=lambda index: f"1.2.5.{index}")
    Ct(hu=LATER, edit=uids, patient="Schmidt-7").write(tmp_path, "b{}")
    assert_never_silently_wrong(tmp_path, Expected((Truth(Grid()), Truth(Grid(), LATER))))


# ---- localizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("told_by", ["image type", "direction"])
@pytest.mark.parametrize("count", [1, 2])
def test_localizers_in_a_series_are_skipped(tmp_path, geometry, told_by, count):
    ct = ct_on(geometry)
    ct.write(tmp_path)
    edit = both(other_instances, change(ImageOrientationPatient=across(ct.grid)))
    if told_by == "image type":
        edit = both(edit, change(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"]))
    ct.but(hu=LATER, edit=edit).write(tmp_path, "scout{}", only=range(count))
    assert_never_silently_wrong(tmp_path, right(ct, aside={C.NOT_VOLUME: count}))


def test_a_localizer_in_the_plane_of_the_slices_is_known_by_its_image_type(tmp_path):
    Ct().write(tmp_path)
    edit = both(other_instances, change(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    Ct(hu=LATER, edit=edit).write(tmp_path, "scout{}", only=[4])
    assert_never_silently_wrong(tmp_path, right(Ct(), aside={C.NOT_VOLUME: 1}))


@pytest.mark.parametrize("cosines", [[-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, -1, 0], [0, 1, 0, 1, 0, 0]], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_slices_at_the_end_that_are_turned_in_their_plane_are_no_localizers(tmp_path, cosines, count):
    """Skipped, they would be missing from the volume, and nothing would say so."""
    turned = change(range(SLICES - count, SLICES), ImageOrientationPatient=cosines)
    Ct(edit=turned).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(C.ORIENTATION_INVALID))


def test_a_series_of_localizers_gives_no_volume(tmp_path):
    Ct(edit=change(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])).write(tmp_path, only=range(2))
    assert_never_silently_wrong(tmp_path, refused(C.NOT_VOLUME, 2))


# ---- orientation ----------------------------------------------------------------------------------------------------

DISORIENTED = {
    "absent": {"ImageOrientationPatient": None},
    "empty": {"ImageOrientationPatient": b""},
    "zero": {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
    "too long": {"ImageOrientationPatient": [1.01, 0, 0, 0, 1, 0]},
    "not at right angles": {"ImageOrientationPatient": [1, 0, 0, 0.1, 0.995, 0]},
    "rows along columns": {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
    "not a number": {"ImageOrientationPatient": b"1\\0\\0\\0\\NaN\\0 "},
    "text": {"ImageOrientationPatient": b"A\\B\\C\\D\\E\\F "},
    "five values": {"ImageOrientationPatient": [1, 0, 0, 0, 1]},
    "position absent": {"ImagePositionPatient": None},
    "position empty": {"ImagePositionPatient": b""},
    "position infinite": {"ImagePositionPatient": b"0\\0\\inf "},
    "two of three positions": {"ImagePositionPatient": [0, 0]},
    "directions beyond all numbers": {"ImageOrientationPatient": b"1e200\\0\\0\\0\\1e200\\0 "},
    "position beyond all numbers": {"ImagePositionPatient": b"0\\0\\1e307 "},
}


@pytest.mark.parametrize("at", [None, 5], ids=["all slices", "one slice"])
@pytest.mark.parametrize("name", DISORIENTED)
def test_a_slice_that_lies_nowhere_is_refused(tmp_path, name, at):
    codes = (C.ORIENTATION_INVALID, C.TAG_INVALID) if name in ("text", "not a number") else C.ORIENTATION_INVALID
    Ct(damage=change(at, **DISORIENTED[name])).write(tmp_path)
    assert_never_silently_wrong(tmp_path, refused(codes))


@pytest.mark.parametrize("spacing", ["1e-6", "0.0009", "700", "1e200"])
@pytest.mark.parametrize("slices", [1, SLICES])
def test_pixels_of_a_size_that_no_scanner_makes_are_refused(tmp_path, spacing, slices):
    text = f"{spacing}\\{spacing}".encode()
    Ct(damage=change(PixelSpacing=text)).write(tmp_path, only=range(slices))
    assert_never_silently_wrong(tmp_path, refused(C.TAG_INVALID, slices))


@pytest.mark.parametrize("thickness", [b"0 ", b"-2.5", b"1e-12 ", b"1e300 "])
def test_a_single_slice_of_senseless_thickness_is_one_millimetre_thick(tmp_path, thickness):
    Ct(damage=change(SliceThickness=thickness)).write(tmp_path, only=[3])
    (series,) = scan_folder(tmp_path).series
    assert series.header.slice_thickness_mm is None
    np.testing.assert_allclose(read(series).affine[:3, 2], [0, 0, 1])


@pytest.mark.parametrize("cosines", [[1, 0, 0, 0, 0.9998, 0.02], [0.99995, 0.01, 0, -0.01, 0.99995, 0]], ids=str)
def test_directions_rounded_in_the_header_are_no_fault(tmp_path, cosines):
    cosines = [round(value, 4) for value in cosines]
    row, column = (np.array(part) / np.linalg.norm(part) for part in (cosines[:3], cosines[3:]))
    ct = Ct(grid=Grid(row=tuple(row), column=tuple(column)))
    ct.but(edit=change(ImageOrientationPatient=cosines)).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(ct))


def test_left_is_left_whatever_the_patient_position_tag_says(tmp_path):
    Ct(edit=change(PatientPosition="FFP")).write(tmp_path)
    assert_never_silently_wrong(tmp_path, right(Ct()))
