"""scan_folder: every file accounted for, and each loader trap ends in the right volume or a named refusal."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from ct_builder import TILTED, Ct, Grid, assert_is_phantom, phantom_hu
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset

from medvit.io import read, scan_folder
from medvit.records import EXIT_USAGE, Outcome, ReasonCode, ScanError, UsageError


def codes_of(inventory):
    return {entry.path: entry.code for entry in inventory.files}


def regular_files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def object_of(sop_class: str, modality: str, number: int = 1) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, f"1.2.3.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "1.2.3", "1.2.3.4", modality
    dataset.PatientID = "Mueller-0815"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    return dataset


# ---- the loader shoot-out (PEERS section 1) -------------------------------------------------------------------------


def scrambled(dataset, index):
    dataset.InstanceNumber = (index * 7) % 12 + 1


def without_number(dataset, index):
    del dataset.InstanceNumber


def scout_by_direction(dataset, index):
    """A scout that calls itself AXIAL: only its direction tells."""
    if index == 5:
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def test_case_a_clean_series_is_one_volume(tmp_path):
    Ct().write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert (series.outcome, series.codes, series.shape) == (Outcome.OK, (), (12, 20, 24))
    assert series.spacing_mm == pytest.approx((0.9, 0.7, 2.5))
    assert_is_phantom(read(series))


def test_case_c_two_series_in_one_folder_are_two_volumes(tmp_path):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2, grid=Grid(origin=(0, 0, 1.25))).write(tmp_path, "b{}")
    one, two = sorted(scan_folder(tmp_path).series, key=lambda series: series.uid)
    assert_is_phantom(read(one))
    assert_is_phantom(read(two), Grid(origin=(0, 0, 1.25)))


@pytest.mark.parametrize("edit", [scrambled, without_number], ids=["E scrambled numbers", "H no numbers"])
def test_cases_e_h_slices_are_ordered_by_position_not_by_number(tmp_path, edit):
    Ct(edit=edit).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert series.outcome is Outcome.OK
    assert_is_phantom(read(series))


def test_case_g_localizer_in_the_series_is_dropped_and_named(tmp_path):
    Ct().write(tmp_path)
    scout = Ct().dataset(0)
    scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], "1.2.9"
    scout.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    scout.save_as(tmp_path / "AAA.dcm", enforce_file_format=True)
    inventory = scan_folder(tmp_path)
    assert codes_of(inventory)["AAA.dcm"] is ReasonCode.NOT_VOLUME
    assert_is_phantom(read(inventory.series[0]))


def test_case_i_coronal_acquisition_is_a_volume_and_not_axial(tmp_path):
    grid = Grid(row=(1, 0, 0), column=(0, 0, -1))
    Ct(grid=grid).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    assert series.outcome is Outcome.OK
    assert not series.axial
    assert_is_phantom(read(series), grid)


def repeated(dataset, index):
    dataset.ImagePositionPatient = Ct().dataset(index // 2).ImagePositionPatient


def two_phases(dataset, index):
    repeated(dataset, index)
    dataset.AcquisitionNumber = index % 2


def uneven(dataset, index):
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, z + (0.9 if index > 6 else 0)]


def bent(dataset, index):
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x + (3 if index == 6 else 0), y, z]


def change(keyword, value, at=None):
    """An edit that sets a tag (None: deletes it) on one slice or on all."""

    def edit(dataset, index):
        if at is not None and index != at:
            return
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)

    edit.__name__ = f"{keyword}={value}"
    return edit


C = ReasonCode
REFUSED = [
    (Ct(edit=repeated), C.DUP_POSITION),  # case F
    (Ct(edit=uneven), C.SPACING_NONUNIFORM),
    (Ct(edit=bent), C.SPACING_NONUNIFORM),
    (Ct(edit=change("FrameOfReferenceUID", "1.2.77", at=3)), C.ORIENTATION_INVALID),
    (Ct(edit=change("ImageOrientationPatient", None, at=3)), C.ORIENTATION_INVALID),
    (Ct(edit=change("ImagePositionPatient", None, at=3)), C.ORIENTATION_INVALID),
    (Ct(edit=change("ImageOrientationPatient", [1, 0, 0, 0.1, 1, 0])), C.ORIENTATION_INVALID),
    (Ct(edit=change("ImageOrientationPatient", [0, 0, 0, 0, 0, 0])), C.ORIENTATION_INVALID),
    (Ct(edit=change("PixelSpacing", None)), C.TAG_INVALID),
    (Ct(edit=change("PixelSpacing", [0, 0.7])), C.TAG_INVALID),
    (Ct(edit=change("PixelSpacing", [0.7, 0.8], at=11)), C.MATRIX_MISMATCH),
    (Ct(edit=change("Rows", 19, at=11)), C.MATRIX_MISMATCH),
    (Ct(edit=change("Rows", 65535)), C.PIXEL_TRUNCATED),
    (Ct(edit=change("Rows", 0)), C.TAG_INVALID),
    (Ct(edit=change("RescaleSlope", None, at=4)), C.RESCALE_MISSING),
    (Ct(edit=change("RescaleIntercept", None)), C.RESCALE_MISSING),
    (Ct(edit=change("RescaleSlope", 0)), C.RESCALE_INVALID),
    (Ct(edit=change("RescaleSlope", -1, at=11)), C.RESCALE_INVALID),
    (Ct(edit=change("RescaleType", "US")), C.RESCALE_UNITS),
    (Ct(edit=change("PatientID", "Schmidt-7", at=11)), C.PATIENT_CONFLICT),
    (Ct(edit=change("PatientBirthDate", "19700102", at=11)), C.PATIENT_CONFLICT),
    (Ct(edit=change("PatientSex", "M", at=11)), C.PATIENT_CONFLICT),
    (Ct(transfer_syntax="1.2.840.10008.1.2.1", edit=None, hu=np.full((3, 20, 24), -500)), C.HU_IMPLAUSIBLE),
]
"""What no volume may come of, and the code that says why."""


@pytest.mark.parametrize(("ct", "code"), REFUSED, ids=lambda v: getattr(getattr(v, "edit", None), "__name__", None))
def test_what_is_no_honest_volume_is_refused_by_name(tmp_path, ct, code):
    ct.write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    with pytest.raises(ScanError) as caught:
        read(series)
    assert caught.value.code is code
    if code not in (C.HU_IMPLAUSIBLE, C.PIXEL_TRUNCATED):  # these need the pixels
        assert (series.outcome, series.codes) == (Outcome.QUARANTINE, (code,))


def test_case_b_missing_slice_is_refused_and_the_gap_is_named(tmp_path):
    Ct().write(tmp_path, only=[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    (series,) = scan_folder(tmp_path).series
    assert series.codes == (ReasonCode.SLICE_MISSING,)
    assert "1 missing at 2.5 mm" in series.detail
    assert "117.25..122.25" in series.detail


def test_rounding_of_positions_is_no_gap(tmp_path):
    def rounded(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, round(float(z), 1)]  # 107.25 -> 107.2, 109.75 -> 109.8

    Ct(edit=rounded).write(tmp_path)
    assert scan_folder(tmp_path).series[0].outcome is Outcome.OK


# ---- files that are no slice ----------------------------------------------------------------------------------------

OBJECTS = [
    ("1.2.840.10008.5.1.4.1.1.88.33", "SR", C.NOT_VOLUME, Outcome.SKIP),
    ("1.2.840.10008.5.1.4.1.1.7", "CT", C.NOT_VOLUME, Outcome.SKIP),  # secondary capture
    ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", C.NOT_VOLUME, Outcome.SKIP),
    ("1.2.840.10008.1.3.10", "", C.NOT_VOLUME, Outcome.SKIP),  # DICOMDIR
    ("1.2.840.10008.5.1.4.1.1.4", "MR", C.MODALITY, Outcome.SKIP),
    ("1.2.840.10008.5.1.4.1.1.128", "PT", C.MODALITY, Outcome.SKIP),
    ("1.2.840.10008.5.1.4.1.1.2.1", "CT", C.MULTIFRAME_UNSUPPORTED, Outcome.QUARANTINE),
]


@pytest.mark.parametrize(("sop_class", "modality", "code", "outcome"), OBJECTS)
def test_other_objects_are_named_by_what_they_are(tmp_path, sop_class, modality, code, outcome):
    object_of(sop_class, modality).save_as(tmp_path / "IM0001.dcm", enforce_file_format=True)
    inventory = scan_folder(tmp_path)
    (entry,) = inventory.files
    assert (entry.code, entry.outcome, inventory.series) == (code, outcome, ())


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (change("PhotometricInterpretation", "PALETTE COLOR"), C.PHOTOMETRIC),
        (change("SamplesPerPixel", 3), C.PHOTOMETRIC),
        (change("NumberOfFrames", 12), C.MULTIFRAME_UNSUPPORTED),
        (change("SOPInstanceUID", ""), C.TAG_INVALID),
        (change("SeriesInstanceUID", None), C.TAG_INVALID),
    ],
)
def test_a_ct_file_that_is_no_slice_is_named(tmp_path, edit, code):
    def without_meta_check(dataset, index):
        edit(dataset, index)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"

    dataset = Ct().dataset(0)
    without_meta_check(dataset, 0)
    dataset.save_as(tmp_path / "a", enforce_file_format=False)
    written = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(written if written[128:132] == b"DICM" else b"\0" * 128 + b"DICM" + written)
    (entry,) = scan_folder(tmp_path).files
    assert entry.code is code


@pytest.mark.parametrize(
    ("name", "content", "outcome"),
    [
        ("empty.dcm", b"", Outcome.REJECT),
        ("garbage.dcm", bytes(range(256)) * 20, Outcome.REJECT),
        ("short", b"\0" * 128 + b"DICM", Outcome.QUARANTINE),
        ("html.dcm", b"<html>login expired</html>" * 50, Outcome.REJECT),
        ("notes.txt", b"call the PACS team", Outcome.SKIP),
        ("labels.csv", b"a,b\n1,2\n", Outcome.SKIP),
        ("DICOMDIR", b"no DICOM at all", Outcome.SKIP),
    ],
)
def test_what_is_no_dicom_is_rejected_or_skipped_never_read(tmp_path, name, content, outcome):
    (tmp_path / name).write_bytes(content)
    inventory = scan_folder(tmp_path)
    (entry,) = inventory.files
    assert (entry.outcome, inventory.series) == (outcome, ())
    assert entry.code is not None


def test_unknown_transfer_syntax_is_refused_by_uid(tmp_path):
    (path,) = Ct().write(tmp_path, only=[0])
    raw = path.read_bytes()
    uid = b"1.2.840.10008.1.2.1\0"
    assert raw.count(uid) == 1
    path.write_bytes(raw.replace(uid, b"1.2.840.10008.1.2.99"))  # the same length
    (series,) = scan_folder(tmp_path).series
    assert series.codes == (ReasonCode.TS_UNSUPPORTED,)
    assert "1.2.840.10008.1.2.99" in series.detail


@pytest.mark.parametrize("implicit", [True, False])
def test_file_without_preamble_is_read_and_flagged(tmp_path, implicit):
    for index in range(12):
        dataset = Ct().dataset(index)
        del dataset.file_meta
        dataset.save_as(tmp_path / f"{index}", implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert (tmp_path / f"{index}").read_bytes()[128:132] != b"DICM"
    (series,) = scan_folder(tmp_path).series
    assert (series.outcome, series.codes) == (Outcome.FLAG, (ReasonCode.NO_PREAMBLE,))
    assert_is_phantom(read(series))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_native_pixels_cut_short_quarantine_the_series_at_listing(tmp_path, syntax):
    paths = Ct(transfer_syntax=syntax).write(tmp_path)
    paths[-1].write_bytes(paths[-1].read_bytes()[:-100])
    inventory = scan_folder(tmp_path)
    assert inventory.series[0].codes == (ReasonCode.PIXEL_TRUNCATED,)
    assert {entry.outcome for entry in inventory.files} == {Outcome.QUARANTINE}  # never one slice less


def test_a_file_cut_off_anywhere_is_never_taken_for_normal(slices, tmp_path):
    """A cut between two elements leaves a header that parses; skipping it would shorten a volume without a word."""
    for cut in range(0, len(slices[0]), 7):
        (tmp_path / "IM1.dcm").write_bytes(slices[0][:cut])
        (entry,) = scan_folder(tmp_path).files
        assert entry.outcome in (Outcome.REJECT, Outcome.QUARANTINE), cut


def test_dicomdir_is_known_by_its_meta_information(tmp_path):
    dataset = object_of("1.2.840.10008.1.3.10", "")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.1"
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        del dataset[keyword]
    dataset.save_as(tmp_path / "INDEX", enforce_file_format=True)
    (entry,) = scan_folder(tmp_path).files
    assert (entry.code, entry.outcome) == (ReasonCode.NOT_VOLUME, Outcome.SKIP)


def test_absurd_dimensions_are_refused_before_any_pixel_is_read(tmp_path):
    Ct(edit=change("Rows", 65535)).write(tmp_path, only=[0])
    (path,) = tmp_path.iterdir()
    dataset = dcmread(path)
    dataset.Columns = 65535
    dataset.save_as(path)
    (series,) = scan_folder(tmp_path).series
    assert series.codes == (ReasonCode.RESOURCE_LIMIT,)


# ---- copies, conflicts ----------------------------------------------------------------------------------------------


def test_identical_copies_are_set_aside_and_the_series_stays_whole(tmp_path):
    paths = Ct().write(tmp_path)
    (tmp_path / "sub").mkdir()
    for path in paths[:3]:
        shutil.copy(path, tmp_path / "sub" / path.name)
    inventory = scan_folder(tmp_path)
    assert list(codes_of(inventory).values()).count(ReasonCode.DUP_IDENTICAL) == 3
    assert_is_phantom(read(inventory.series[0]))


def test_one_uid_for_two_contents_quarantines_the_series(tmp_path):
    Ct().write(tmp_path)
    other = Ct().dataset(4)
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "again.dcm", enforce_file_format=True)
    (series,) = scan_folder(tmp_path).series
    assert (series.outcome, series.codes) == (Outcome.QUARANTINE, (ReasonCode.DUP_CONFLICT,))


@pytest.mark.parametrize("edit", [change("PatientID", "Schmidt-7"), change("PatientSex", "M")])
def test_two_patients_in_one_study_quarantine_all_of_it(tmp_path, edit):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2, edit=edit).write(tmp_path, "b{}")
    assert {series.codes for series in scan_folder(tmp_path).series} == {(ReasonCode.PATIENT_CONFLICT,)}


@pytest.mark.parametrize("name", ["0{}", "z{}"])
def test_a_stray_slice_of_another_patient_taints_the_whole_study_whatever_its_name(tmp_path, name):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2).write(tmp_path, "b{}", only=range(11))
    Ct(uid=2, patient="Schmidt-7").write(tmp_path, name, only=[11])
    assert {series.codes for series in scan_folder(tmp_path).series} == {(ReasonCode.PATIENT_CONFLICT,)}


def test_another_study_with_another_patient_is_no_conflict(tmp_path):
    Ct().write(tmp_path, "a{}")
    Ct(study=2, patient="Schmidt-7").write(tmp_path, "b{}")
    assert {series.outcome for series in scan_folder(tmp_path).series} == {Outcome.OK}


def test_assumed_hu_are_flagged(tmp_path):
    Ct(intercept=0, signed=True, edit=change("RescaleSlope", None)).write(tmp_path)
    (series,) = scan_folder(tmp_path, assume_hu=True).series
    assert (series.outcome, series.codes) == (Outcome.FLAG, (ReasonCode.RESCALE_MISSING,))
    assert_is_phantom(read(series))


# ---- folders and links ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_missing_empty_and_no_folder_are_wrong_usage(tmp_path, make):
    make(tmp_path / "ct")
    with pytest.raises(UsageError) as caught:
        scan_folder(tmp_path / "ct")
    assert caught.value.exit_code == EXIT_USAGE == 2


def test_links_are_listed_and_never_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "ct"
    Ct(uid=2).write(outside)
    Ct().write(folder)
    (folder / "file").symlink_to(outside / "IM0000.dcm")
    (folder / "dir").symlink_to(outside)
    (folder / "nowhere").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe")
    inventory = scan_folder(folder)
    assert len(inventory.series) == 1
    odd = {path for path, code in codes_of(inventory).items() if code is ReasonCode.NOT_REGULAR}
    assert odd == {"file", "dir", "nowhere", "pipe"}


def test_a_loop_of_links_ends(tmp_path):
    Ct().write(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    inventory = scan_folder(tmp_path)
    assert len(inventory.files) == 13


# ---- properties -----------------------------------------------------------------------------------------------------

JUNK = {
    "text": b"hello",
    "empty": b"",
    "noise": bytes(range(256)) * 8,
    "half": b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0",
    "zip": b"PK\x03\x04" + b"\0" * 200,
}
SUFFIXES = ("", ".dcm", ".nii", ".nii.gz", ".txt", ".IMA", ".mha")


@pytest.fixture(scope="module")
def slices():
    with tempfile.TemporaryDirectory() as folder:
        yield [path.read_bytes() for path in Ct().write(Path(folder))]


@settings(max_examples=25, deadline=None)
@given(
    junk=st.lists(st.tuples(st.sampled_from(sorted(JUNK)), st.sampled_from(SUFFIXES), st.integers(0, 2)), max_size=8),
    picked=st.lists(st.integers(0, 11), max_size=8),
    cut=st.integers(0, 4000),
)
def test_every_regular_file_has_exactly_one_entry(slices, junk, picked, cut):
    contents = [(slices[i], ".dcm", i % 3) for i in picked] + [(JUNK[n], s, d) for n, s, d in junk]
    contents.append((slices[0][:cut], ".dcm", 0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (content, suffix, depth) in enumerate(contents):
            place = folder.joinpath(*["deep"] * depth)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"f{number}{suffix}").write_bytes(content)
        inventory = scan_folder(folder)
        assert sorted(entry.path for entry in inventory.files) == regular_files(folder)
        assert sum(inventory.counts().values()) == len(contents)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(12)))
def test_file_names_mean_nothing(slices, order):
    with tempfile.TemporaryDirectory() as name:
        for number, content in zip(order, slices, strict=True):
            (Path(name) / f"{number:02d}").write_bytes(content)
        scan = read(name)
    assert_is_phantom(scan)
    assert scan.header.sop_uids == tuple(sorted(scan.header.sop_uids, key=lambda uid: int(uid.rsplit(".", 1)[1])))


def test_frame_has_a_row_for_each_series(tmp_path):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2, grid=TILTED).write(tmp_path, "b{}")
    Ct(uid=3, edit=uneven).write(tmp_path, "c{}")
    frame = scan_folder(tmp_path).to_frame().set_index("outcome")
    assert frame.loc["ok", "slices"] == 12
    assert frame.loc["flag", "codes"] == "GANTRY_TILT"
    assert frame.loc["quarantine", "codes"] == "SPACING_NONUNIFORM"


def test_progress_names_each_file_once(tmp_path):
    Ct().write(tmp_path)
    seen = []
    scan_folder(tmp_path, progress=seen.append)
    assert sorted(seen) == regular_files(tmp_path)


def test_nothing_told_about_a_faulty_series_identifies_the_patient(tmp_path):
    Ct(edit=change("PatientID", "Schmidt-7", at=2)).write(tmp_path)
    inventory = scan_folder(tmp_path)
    told = " ".join(series.detail for series in inventory.series) + " ".join(e.detail for e in inventory.files)
    assert not {"Mueller", "0815", "Schmidt", "1960"} & set(told.replace("-", " ").replace("^", " ").split())


def test_phantom_varies_along_each_axis():
    assert len({float(np.diff(phantom_hu(), axis=axis).mean()) for axis in range(3)}) == 3


CD = {
    "autorun.inf": b"[autorun]\nopen=viewer.exe",
    "viewer.exe": b"MZ" + bytes(900),
    "bin/viewer.DLL": b"MZ" + bytes(900),
    "index.htm": b"<html>",
    "style.css": b"a {}",
    "logo.gif": b"GIF89a",
    "thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(600),
    "lockfile": b"",
    "README": b"How to use the viewer",
}


def test_a_cd_with_its_viewer_is_one_good_series(tmp_path):
    """Nothing of it claims to be an image, so nobody need look at it, and the folder is read as it is."""
    Ct().write(tmp_path / "IMAGES")
    for name, content in CD.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    inventory = scan_folder(tmp_path)
    assert (inventory.counts()["ok"], inventory.counts()["skip"], len(inventory.files)) == (12, len(CD), 12 + len(CD))
    assert_is_phantom(read(tmp_path))


def test_what_a_mac_leaves_beside_each_file_is_no_image(tmp_path):
    attributes = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4070)
    for path in Ct().write(tmp_path):
        (tmp_path / f"._{path.name}").write_bytes(attributes)
    (tmp_path / "._ct.nii.gz").write_bytes(attributes)
    inventory = scan_folder(tmp_path)
    assert (len(inventory.series), inventory.counts()["ok"], inventory.counts()["skip"]) == (1, 12, 13)
    assert_is_phantom(read(tmp_path))
