"""One SeriesInstanceUID that holds several volumes, or half of one: told apart or set aside, never half a volume."""

import numpy as np
import pytest
from ct_builder import SLICES, Ct, Grid, assert_is_phantom, phantom_hu

from medvit.io import read, read_files, scan_folder
from medvit.records import Outcome, ReasonCode, ScanError

C = ReasonCode


def two_phases(folder, tag, first, second):
    """The phantom twice at the same positions in one series, told apart by one tag; the second is 7 HU denser."""
    for number, value in enumerate((first, second)):

        def edit(dataset, index, number=number, value=value):
            dataset.SOPInstanceUID = f"1.2.3.{number}.{index + 1}"
            setattr(dataset, tag, value(index) if callable(value) else value)

        Ct(hu=phantom_hu() + 7 * number, edit=edit).write(folder, f"{number}_{{}}")


@pytest.mark.parametrize(
    ("tag", "first", "second"),
    [
        ("ConvolutionKernel", "B30f", "B70f"),
        ("AcquisitionNumber", 1, 2),
        ("TemporalPositionIdentifier", 1, 2),
        ("NominalPercentageOfCardiacPhase", 40.0, 75.0),
        ("TriggerTime", "300", "600"),
        ("KVP", "80", "140"),
        ("SliceThickness", "2.5", "3"),
        ("ContrastBolusAgent", "", "Omnipaque"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL"]),
        ("AcquisitionTime", "100000", "100500"),
    ],
)
def test_two_volumes_at_the_same_positions_are_told_apart(tmp_path, tag, first, second):
    two_phases(tmp_path, tag, first, second)
    one, two = scan_folder(tmp_path).series
    assert one.uid == two.uid
    assert {one.part, two.part} == {0, 1}
    assert one.header.phase != two.header.phase
    volumes = sorted((read(series) for series in (one, two)), key=lambda scan: float(scan.hu.min()))
    for number, scan in enumerate(volumes):
        assert C.MULTIPHASE in scan.codes
        np.testing.assert_array_equal(scan.hu, phantom_hu() + 7 * number)


def test_what_a_person_wrote_of_the_contrast_is_not_repeated(tmp_path):
    two_phases(tmp_path, "ContrastBolusAgent", "Omnipaque for Mrs Mueller", "")
    inventory = scan_folder(tmp_path)
    told = str([(e.detail, e.path) for e in inventory.files]) + str(inventory.series)
    assert "Mueller" not in told
    assert "Mueller" not in str([series.header.acquisition() for series in inventory.series])


def test_shots_of_a_shuttling_table_are_not_taken_for_phases(tmp_path):
    """Two positions of the table, two times at each: a number per shot tells positions apart, the time index phases."""

    def shot(index):
        return 1 + (index >= SLICES // 2)

    for time in (1, 2):

        def edit(dataset, index, time=time):
            dataset.SOPInstanceUID = f"1.2.3.{time}.{index + 1}"
            dataset.AcquisitionNumber = 2 * time + shot(index)
            dataset.TemporalPositionIdentifier = time

        Ct(edit=edit).write(tmp_path, f"{time}_{{}}")
    for series in scan_folder(tmp_path).series:
        assert_is_phantom(read(series))


def test_two_acquisitions_half_a_step_apart_are_not_one_volume(tmp_path):
    def number(dataset, index):
        dataset.AcquisitionNumber = 1 + index % 2

    Ct(edit=number).write(tmp_path)
    series = scan_folder(tmp_path).series
    assert [one.shape[0] for one in series] == [6, 6]
    assert all(C.MULTIPHASE in one.codes for one in series)


def test_a_number_for_each_slice_tells_nothing_apart(tmp_path):
    Ct(edit=lambda dataset, index: setattr(dataset, "AcquisitionNumber", index + 1)).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert (series.outcome, series.codes) == (Outcome.OK, ())
    assert_is_phantom(read(series))


def half(tag, value):
    def edit(dataset, index):
        if index >= SLICES // 2:
            if value is None:
                del dataset[tag]
            else:
                setattr(dataset, tag, value)

    return edit


@pytest.mark.parametrize(
    "edit",
    [half("FrameOfReferenceUID", None), half("StudyInstanceUID", "1.2.99"), half("PixelSpacing", [0.8, 0.9])],
    ids=["frame of reference", "study", "spacing"],
)
def test_one_volume_torn_in_two_is_no_two_volumes(tmp_path, edit):
    Ct(edit=edit).write(tmp_path)
    assert not any(series.usable for series in scan_folder(tmp_path).series)


def test_rounding_of_the_pixel_spacing_tears_nothing(tmp_path):
    def rounding(dataset, index):
        if index % 2:
            dataset.PixelSpacing = [0.7, 0.9000001]

    Ct(edit=rounding).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert_is_phantom(read(series))


@pytest.mark.parametrize("tag", ["PatientBirthDate", "PatientSex", "PatientID"])
def test_what_is_absent_contradicts_nothing(tmp_path, tag):
    Ct(edit=half(tag, "")).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert series.usable
    Ct(edit=half(tag, "M" if tag == "PatientSex" else "19990909")).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert series.codes == (C.PATIENT_CONFLICT,)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize(
    ("tag", "value"), [("PhotometricInterpretation", None), ("NumberOfFrames", 2), ("SOPInstanceUID", "../../etc/x")]
)
def test_a_broken_slice_at_the_end_is_not_dropped_from_its_series(tmp_path, tag, value):
    def edit(dataset, index):
        if index == SLICES - 1:
            if value is None:
                del dataset[tag]
            else:
                setattr(dataset, tag, value)

    Ct(edit=edit).write(tmp_path)
    assert not any(series.usable for series in scan_folder(tmp_path).series)
    with pytest.raises(ScanError):
        read(tmp_path)


def test_a_broken_copy_of_a_slice_takes_nothing_away(tmp_path):
    paths = Ct().write(tmp_path)
    raw = paths[3].read_bytes()
    (tmp_path / "copy.dcm").write_bytes(raw[: raw.index(b"(\0\x04\0CS")])
    inventory = scan_folder(tmp_path)
    assert_is_phantom(read(inventory.series[0]))
    assert next(entry for entry in inventory.files if entry.path == "copy.dcm").outcome.bad


def test_a_folder_with_a_file_that_cannot_be_used_is_not_read_without_a_word(tmp_path):
    """It may have been a slice; who wants the rest lists the folder and sees what became of it."""
    Ct().write(tmp_path)
    (tmp_path / "IM9999.dcm").write_bytes(b"")
    assert_is_phantom(read(scan_folder(tmp_path).series[0]))
    with pytest.raises(ScanError, match="beside the series"):
        read(tmp_path)


def test_files_of_two_series_are_not_one(tmp_path):
    paths = Ct().write(tmp_path / "a", only=range(6)) + Ct(uid=2).write(tmp_path / "b", only=range(6, 12))
    with pytest.raises(ScanError, match="several series"):
        read_files(paths)


def test_files_with_two_volumes_are_not_read_without_saying_which(tmp_path):
    two_phases(tmp_path, "AcquisitionNumber", 1, 2)
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(ScanError) as caught:
        read_files(paths)
    assert caught.value.code is C.MULTIPHASE
    assert read_files(paths, part=1).hu.shape == (12, 20, 24)
    with pytest.raises(ScanError):
        read_files(paths, part=7)


def test_a_deep_folder_costs_no_more_than_itself(tmp_path):
    Ct().write(tmp_path / "ct")
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    Ct(uid=2, study=2, grid=Grid()).write(deep)
    assert [series.shape[0] for series in scan_folder(tmp_path).series] == [12, 12]
