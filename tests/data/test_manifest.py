"""Labels meet files: by the first key there is, contradictions stop the run, nothing is lost without a word."""

import shutil
from dataclasses import asdict, replace

import nibabel as nib
import numpy as np
import pytest
from ct_builder import Ct, Grid, phantom_hu

from medvit.data import build_manifest
from medvit.data.labels import read_labels
from medvit.data.manifest import unlabelled_cases
from medvit.data.pseudonym import pseudonym
from medvit.data.selection import select_series
from medvit.io import read_files, scan_folder
from medvit.records import EXIT_USAGE, ReasonCode, UsageError

UID = "1.2.826.0.1.3680043.8.498"
CANARIES = ("Mueller", "0815", "Schmidt", "4711", "Anna", "19600102")
SMALL = phantom_hu(2)
GAP = (0, 1, 2, 4, 5)


@pytest.fixture
def hospital(tmp_path):
    """Two patients: the first with a thin, a thick and a sagittal series in one study; the second with one."""
    folder = tmp_path / "ct"
    Ct(hu=phantom_hu(4)).write(folder / "a", "thin{}.dcm")
    Ct(hu=phantom_hu(3), uid=2).write(folder / "a", "thick{}.dcm")
    Ct(hu=phantom_hu(5), uid=3, grid=Grid(row=(0, 1, 0), column=(0, 0, -1))).write(folder / "a", "sag{}.dcm")
    Ct(hu=SMALL, study=2, patient="Schmidt-4711").write(folder / "b", "x{}.dcm")
    return folder


def manifest_of(folder, text, name="labels.csv", encoding="utf-8", **options):
    labels = folder.parent / name
    labels.write_text(text, encoding=encoding)
    return build_manifest(scan_folder(folder), labels, **options)


def labels_of(manifest):
    return sorted((case.series_uid.removeprefix(UID), case.label) for case in manifest.cases)


TWO = [(".1.1", "yes"), (".2.1", "no")]


@pytest.mark.parametrize(
    ("column", "one", "two"),
    [
        ("patient_id", "Mueller-0815", "Schmidt-4711"),
        ("PatientID", "Mueller-0815", "Schmidt-4711"),
        ("study_uid", f"{UID}.1", f"{UID}.2"),
        ("StudyInstanceUID", f"{UID}.1", f"{UID}.2"),
        ("series_uid", f"{UID}.1.1", f"{UID}.2.1"),
        ("SeriesInstanceUID", f"{UID}.1.1", f"{UID}.2.1"),
    ],
)
def test_each_key_and_its_dicom_spelling_joins(hospital, column, one, two):
    manifest = manifest_of(hospital, f"{column},label\n{one},yes\n{two},no\n")
    assert labels_of(manifest) == TWO
    assert manifest.classes == ("no", "yes")


@pytest.mark.parametrize(("sep", "encoding"), [(";", "utf-8"), ("\t", "utf-8"), (",", "utf-8-sig"), (";", "utf-8-sig")])
def test_separators_and_byte_order_mark_of_spreadsheets(hospital, sep, encoding):
    text = "patient_id,label\r\nMueller-0815,yes\r\nSchmidt-4711,no\r\n".replace(",", sep)
    assert labels_of(manifest_of(hospital, text, encoding=encoding)) == TWO


def test_the_first_key_joins_and_further_ones_are_checked(hospital):
    good = f"patient_id,series_uid,label\nMueller-0815,{UID}.1.2,yes\nSchmidt-4711,{UID}.2.1,no\n"
    manifest = manifest_of(hospital, good)
    assert manifest.key == "series_uid"
    assert labels_of(manifest) == [(".1.2", "yes"), (".2.1", "no")]


@pytest.mark.parametrize(
    ("column", "wrong"), [("patient_id", "Schmidt-4711"), ("study_uid", f"{UID}.2"), ("PatientID", "x")]
)
def test_contradicting_keys_stop_and_name_the_lines(hospital, column, wrong):
    right = {"patient_id": "Schmidt-4711", "study_uid": f"{UID}.2", "PatientID": "Schmidt-4711"}[column]
    text = f"series_uid,{column},label\n{UID}.2.1,{right},no\n\n{UID}.1.1,{wrong},yes\n"
    with pytest.raises(UsageError, match=r"line 4 \(1 in all\)") as caught:  # the blank line counts
        manifest_of(hospital, text)
    assert caught.value.exit_code == EXIT_USAGE


def test_two_rows_that_contradict_each_other_are_named(hospital):
    with pytest.raises(UsageError, match=r"lines 2 and 4.*key the table by study_uid"):
        manifest_of(hospital, "patient_id,label\nMueller-0815,yes\nSchmidt-4711,no\nMueller-0815,no\n")


def test_a_row_said_twice_is_said_once_and_is_not_unmatched(hospital):
    manifest = manifest_of(hospital, "patient_id,label\nMueller-0815,yes\nMueller-0815,yes\nSchmidt-4711,no\n")
    assert (len(manifest.cases), manifest.unmatched_rows) == (2, ())


def test_rows_without_scan_and_scans_without_row_are_both_listed(hospital):
    text = f"series_uid,label\n{UID}.1.1,yes\n9.9.9,yes\n{UID}.2.1,no\n8.8,no\n"
    manifest = manifest_of(hospital, text)
    assert manifest.unmatched_rows == (3, 5)
    assert manifest.without_row == 2


@pytest.mark.parametrize(
    ("key", "good", "bad", "absent"),
    [
        ("patient_id", "Mueller-0815", "Weber", "Nobody"),
        ("study_uid", f"{UID}.1", f"{UID}.3", "9.9"),
        ("series_uid", f"{UID}.1.1", f"{UID}.3.1", "9.9"),
        ("sop_uid", f"{UID}.1.1.1", f"{UID}.3.1.1", "9.9"),
        ("path", "a/thin0.dcm", "c/x0.dcm", "c/y0.dcm"),
    ],
)
def test_a_row_whose_scan_was_set_aside_is_not_one_without_a_file(hospital, key, good, bad, absent):
    """Whoever reads that no file matches looks for an export that is not missing."""

    def unscaled(dataset, index):
        del dataset.RescaleSlope, dataset.RescaleIntercept

    Ct(hu=SMALL, study=3, patient="Weber", edit=unscaled).write(hospital / "c", "x{}.dcm")
    other = {"patient_id": "Schmidt-4711", "path": "b/x0.dcm"}.get(key, good.replace(f"{UID}.1", f"{UID}.2"))
    rows = f"{key},label\n{good},yes\n{absent},no\n{bad},yes\n,no\n{other},no\n"
    manifest = manifest_of(hospital, rows)
    assert (manifest.unmatched_rows, manifest.set_aside_rows) == ((3, 5), (4,))
    with pytest.raises(UsageError, match=r"none of 1 rows.* 1 of them mean scans that were set aside"):
        manifest_of(hospital, f"{key},label\n{bad},yes\n")


@pytest.mark.parametrize("nothing", ["", "NA", "#N/A", "NaN", "NULL"])
def test_empty_label_is_an_unlabelled_case(nothing, hospital):
    """As pandas, R, Excel and databases write it: a class of those whom nobody has read would be learned."""
    Ct(hu=SMALL, study=3, patient="Weber").write(hospital / "c")
    manifest = manifest_of(hospital, f"patient_id,label\nMueller-0815,yes\nSchmidt-4711,no\nWeber,{nothing}\n")
    assert sorted(str(case.label) for case in manifest.cases) == ["None", "no", "yes"]
    assert manifest.classes == ("no", "yes")


BAD = [
    ("patient_id,lable\nMueller-0815,yes\n", "Did you mean 'lable'"),
    ("patient_id,y\nMueller-0815,yes\n", "no column 'label'"),
    ("name,label\nMueller,yes\n", "no key column"),
    ("patient_id,label\nNobody,yes\n", "none of 1 rows matches"),
    ("patient_id,label\nMueller-0815,yes\nSchmidt-4711,yes\n", "only 'yes'"),
    ("patient_id,label\nMueller-0815,\nSchmidt-4711,\n", "no label"),
    ("patient_id,label\n", "no rows"),
    ("", "no rows"),
    ("patient_id,label\nMueller-0815,yes,no\nSchmidt-4711,no\n", "line 2 has more cells"),
    ("patient_id,label,label\nMueller-0815,yes,no\nSchmidt-4711,no,no\n", "twice"),
    ("patient_id,Label,label\nMueller-0815,yes,no\nSchmidt-4711,no,no\n", "capitals make no difference"),
    ("patient_id,label\nMueller-0815,Yes\nSchmidt-4711,yes\n", "'Yes' and 'yes' would be two classes"),
    ("patient_id,label\nMueller-0815,1.0\nSchmidt-4711,1\n", "'1' and '1.0' would be two classes"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_unusable_tables_say_what_is_wrong(hospital, text, message):
    with pytest.raises(UsageError, match=message):
        manifest_of(hospital, text)


def test_missing_or_binary_labels_file_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_labels(tmp_path / "labels.csv")
    (tmp_path / "labels.xlsx").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(UsageError, match="not readable as CSV"):
        read_labels(tmp_path / "labels.xlsx")


@pytest.mark.parametrize("text", ["a,b\n1,2\n\n3,4\n", 'a,b\n"1\n",2\n3,4\n', "a,b\n1,2\n,\n3,4,\n"])
def test_line_numbers_are_those_of_an_editor(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    assert read_labels(tmp_path / "labels.csv") == {2: {"a": "1", "b": "2"}, 4: {"a": "3", "b": "4"}}


# ---- selection ------------------------------------------------------------------------------------------------------


def test_study_labels_take_the_axial_series_with_most_slices(hospital):
    manifest = manifest_of(hospital, f"study_uid,label\n{UID}.1,yes\n{UID}.2,no\n")
    assert labels_of(manifest) == TWO
    assert sorted(other.series.uid for other in manifest.not_selected) == [f"{UID}.1.2", f"{UID}.1.3"]


def test_selection_does_not_depend_on_order(hospital):
    series = scan_folder(hospital).series
    forward, backward = select_series(series), select_series(series[::-1])
    assert {s.uid for s in forward[0]} == {s.uid for s in backward[0]} == {f"{UID}.1.1", f"{UID}.2.1"}


def test_series_without_a_study_are_not_one_study(tmp_path):
    def no_study(dataset, index):
        dataset.StudyInstanceUID = ""

    for n in (1, 2):
        Ct(hu=SMALL, study=n, patient=f"p{n}", edit=no_study).write(tmp_path / f"{n}")
    cases, others = unlabelled_cases(scan_folder(tmp_path))
    assert (len(cases), others) == (2, ())


def test_faulty_series_are_no_candidates(tmp_path):
    Ct().write(tmp_path / "ct", "a{}", only=GAP)
    Ct(hu=SMALL, uid=2).write(tmp_path / "ct", "b{}")
    (case,), _ = unlabelled_cases(scan_folder(tmp_path / "ct"))
    assert case.series_uid.endswith(".1.2")


def test_a_folder_without_usable_ct_is_wrong_usage(tmp_path):
    Ct().write(tmp_path / "ct", only=GAP)
    with pytest.raises(UsageError, match="no usable CT"):
        manifest_of(tmp_path / "ct", "patient_id,label\nMueller-0815,yes\n")


def in_parts(inventory, uid, **changes):
    """The inventory as if the series held a second volume, on the same files unless told otherwise."""
    parts = [replace(s, part=1, **changes) for s in inventory.series if s.uid == uid]
    return replace(inventory, series=inventory.series + tuple(parts))


def test_a_series_label_means_one_volume_of_the_series(hospital):
    labels = hospital.parent / "labels.csv"
    labels.write_text(f"series_uid,label\n{UID}.1.1,yes\n{UID}.2.1,no\n")
    inventory = in_parts(scan_folder(hospital), f"{UID}.1.1", shape=(99, 20, 24))
    manifest = build_manifest(inventory, labels)
    assert [(c.part, c.label) for c in sorted(manifest.cases, key=lambda c: c.label)] == [(0, "no"), (1, "yes")]
    ((series, why),) = [(other.series, other.detail) for other in manifest.not_selected]
    assert series.key == (f"{UID}.1", f"{UID}.1.1", 0)
    assert why == "another volume of this series was chosen: more slices (99 against 4)"


def test_volumes_of_one_series_are_different_cases(hospital):
    uid = f"{UID}.2.1"
    inventory = scan_folder(hospital)
    two = in_parts(inventory, uid)
    second = replace(two, series=tuple(s for s in two.series if s.uid == uid and s.part))
    first = replace(two, series=tuple(s for s in two.series if s.uid == uid and not s.part))
    ((one,), _), ((other,), _) = unlabelled_cases(first), unlabelled_cases(second)
    assert one.case_id != other.case_id
    assert one.patient_id == other.patient_id
    assert one == next(case for case in unlabelled_cases(inventory)[0] if case.series_uid == uid)


def test_a_file_with_two_volumes_is_one_case_and_a_slice_of_a_part_is_read_alone(hospital):
    uid = f"{UID}.2.1"
    Ct(hu=SMALL[:1], study=2, patient="Schmidt-4711").write(hospital / "only", "x{}.dcm")
    for path in (hospital / "b").iterdir():
        path.unlink()
    labels = hospital.parent / "labels.csv"
    labels.write_text("path,label\nonly/x0.dcm,yes\na/thin0.dcm,no\na/thin1.dcm,no\n")
    inventory = in_parts(scan_folder(hospital), uid, shape=(7, 20, 24))
    inventory = replace(
        inventory, series=tuple(replace(s, part=3) if s.uid == f"{UID}.1.1" else s for s in inventory.series)
    )
    manifest = build_manifest(inventory, labels)
    assert sorted((case.files[0], case.part) for case in manifest.cases) == [
        ("a/thin0.dcm", 0),
        ("a/thin1.dcm", 0),
        ("only/x0.dcm", 1),
    ]
    assert [other.series.key for other in manifest.not_selected] == [(f"{UID}.2", uid, 0)]


# ---- slices and paths -----------------------------------------------------------------------------------------------


def test_sop_uid_makes_each_slice_a_case(hospital):
    manifest = manifest_of(hospital, f"sop_uid,label\n{UID}.1.1.1,yes\n{UID}.1.1.2,no\n{UID}.2.1.1,no\n")
    assert len(manifest.cases) == 3
    assert len({case.case_id for case in manifest.cases}) == 3
    assert len({case.group for case in manifest.cases}) == 2  # slices of one patient stay together
    for case in manifest.cases:
        assert len(read_files([hospital / name for name in case.files]).hu) == 1


@pytest.mark.parametrize("prefix", ["", "ct/", "./", "ct/../ct/"])
def test_paths_are_relative_to_the_table_or_to_the_folder(hospital, prefix):
    manifest = manifest_of(hospital, f"path,label\n{prefix}a/thin1.dcm,yes\n{prefix}b/x0.dcm,no\n")
    assert sorted((case.files[0], case.label) for case in manifest.cases) == [
        ("a/thin1.dcm", "yes"),
        ("b/x0.dcm", "no"),
    ]


def test_windows_paths_join(hospital):
    assert len(manifest_of(hospital, "path,label\na\\thin1.dcm,yes\nb\\x0.dcm,no\n").cases) == 2


def test_a_copy_and_a_slice_of_an_irregular_series_can_be_cases(hospital):
    shutil.copy(hospital / "b" / "x0.dcm", hospital / "b" / "y0.dcm")
    (hospital / "a" / "thin1.dcm").unlink()
    manifest = manifest_of(hospital, "path,label\na/thin0.dcm,yes\nb/x0.dcm,no\nb/y0.dcm,no\n")
    assert len(manifest.cases) == 3
    assert len({case.case_id for case in manifest.cases}) == 3


def test_a_slice_of_a_series_with_two_patients_is_no_case(hospital):
    Ct(hu=SMALL, study=2, patient="Weber").dataset(1).save_as(hospital / "b" / "x1.dcm", enforce_file_format=True)
    with pytest.raises(UsageError, match="only 'yes'"):
        manifest_of(hospital, "path,label\na/thin0.dcm,yes\nb/x0.dcm,no\n")


def test_one_series_uid_in_two_studies_keeps_the_patients_apart(tmp_path):
    """De-identification tools have done it; the wrong header would put a slice into the wrong group."""

    def same(dataset, index):
        dataset.SeriesInstanceUID = "1.2.3"

    for n in (1, 2):
        Ct(hu=SMALL, study=n, patient=f"p{n}", edit=same).write(tmp_path / "ct", f"{n}-{{}}")
    shutil.copy(tmp_path / "ct" / "2-0", tmp_path / "ct" / "0-copy")
    manifest = manifest_of(tmp_path / "ct", "path,label\n1-0,yes\n2-0,no\n0-copy,no\n")
    patients = {case.files[0]: case.patient_id for case in manifest.cases}
    one, two = pseudonym("patient", "p1"), pseudonym("patient", "p2")
    assert patients == {"1-0": one, "2-0": two, "0-copy": two}
    assert len({case.case_id for case in unlabelled_cases(scan_folder(tmp_path / "ct"))[0]}) == 2
    with pytest.raises(UsageError, match=r"line 2 names series of several studies.*Key the labels by study_uid"):
        manifest_of(tmp_path / "ct", "series_uid,label\n1.2.3,yes\n9.9,no\n")


# ---- volumes --------------------------------------------------------------------------------------------------------


def volumes(folder, count=3):
    folder.mkdir()
    for n in range(count):
        nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5) + n, np.eye(4)), folder / f"{n}.nii.gz")


@pytest.mark.parametrize("column", ["patient_id", "PatientID"])
def test_volumes_of_one_patient_stay_together_whatever_the_column_is_called(tmp_path, column):
    volumes(tmp_path / "ct")
    manifest = manifest_of(tmp_path / "ct", f"path,{column},label\n0.nii.gz,A,yes\n1.nii.gz,A,no\n2.nii.gz,B,no\n")
    groups = {case.files[0]: case.group for case in manifest.cases}
    assert groups["0.nii.gz"] == groups["1.nii.gz"] != groups["2.nii.gz"]


def test_volumes_have_no_uids_that_a_table_could_contradict(tmp_path):
    volumes(tmp_path / "ct")
    text = "path,study_uid,series_uid,label\n0.nii.gz,1.2,1.2.3,yes\n1.nii.gz,1.3,1.3.1,no\n"
    manifest = manifest_of(tmp_path / "ct", text)
    assert (len(manifest.cases), manifest.without_row) == (2, 1)


# ---- attributes and identity ----------------------------------------------------------------------------------------


def test_columns_win_over_headers_and_the_rest_become_attributes(hospital):
    text = (
        "patient_id,label,site,sex,age,split,scanner\nMueller-0815,yes,South,M,44,TRAIN,x1\nSchmidt-4711,no,,,,test,\n"
    )
    one, two = sorted(manifest_of(hospital, text).cases, key=lambda case: case.label, reverse=True)
    assert (one.site, one.site_source, one.sex, one.age, one.split) == ("South", "column site", "M", 44, "train")
    assert dict(one.attributes) == {"scanner": "x1"}
    assert (two.sex, two.age, two.split, dict(two.attributes)) == ("F", 61, "test", {})


@pytest.mark.parametrize("nothing", ["", "nan", "NaN"])
def test_what_pandas_writes_for_nothing_is_no_label_and_no_age(hospital, nothing):
    text = f"study_uid,label,age\n{UID}.1,yes,{nothing}\n{UID}.2,no,inf\n"
    assert {case.age for case in manifest_of(hospital, text).cases} == {61}  # the header's
    with pytest.raises(UsageError, match="only 'no'"):
        manifest_of(hospital, f"study_uid,label\n{UID}.1,{nothing}\n{UID}.2,no\n")


def test_columns_that_predictions_have_too_go_along_under_another_name(hospital):
    """Else the report would judge the second label, or a reader's call in place of the model's."""
    text = (
        "patient_id,finding,label,Fold,p_mean,age_band,table_label\n"
        "Mueller-0815,yes,no,7,0.3,old,z\nSchmidt-4711,no,yes,8,0.4,x,y\n"
    )
    manifest = manifest_of(hospital, text, label_column="finding")
    one = next(case for case in manifest.cases if case.label == "yes")
    expected = {"table_label_": "no", "table_Fold": "7", "table_p_mean": "0.3", "table_age_band": "old"}
    assert dict(one.attributes) == expected | {"table_label": "z"}
    assert set(manifest.attributes.renamed) == {"label", "Fold", "p_mean", "age_band"}


def test_what_names_people_stays_out_whatever_it_is_called(hospital):
    """By name (as an information system exports it), or because it repeats what the header says."""
    columns = "PatientName,Birth Date,AccessionNumber,Surname,who,born,nodules,insurance,country_of_birth,nhs_trust"
    text = (
        f"patient_id,label,{columns}\n"
        "Mueller-0815,yes,Doe^Ann,1970-05-03,A1,Doe,MUELLER ANNA,19600102,2,public,FR,North\n"
        "Schmidt-4711,no,Doe^Bob,1971-05-03,A2,Doe,Mueller^Anna,1960-01-02,Schmidt-4711,private,DE,South\n"
    )
    manifest = manifest_of(hospital, text)
    kept = {name for case in manifest.cases for name in case.attributes}
    assert kept == {"nodules", "insurance", "country_of_birth", "nhs_trust"}  # one cell may be a number by chance
    assert manifest.attributes.left_out == tuple(columns.split(",")[:6])


def test_what_names_people_stays_out_however_it_is_spelt(hospital):
    """Names first or last, dates as a spreadsheet writes them, an id with something behind it, titles in German."""
    columns = "who,born,number,Nachname,Geburtsdatum,Fall-Nr,date_of_scan,ward"
    text = (
        f"patient_id,label,{columns}\n"
        'Mueller-0815,yes,"Anna Müller",02.01.1960,Mueller-0815/2024,Doe,x,17,01.03.2024,A\n'
        "Schmidt-4711,no,Anna Mueller,1/2/1960,4711,Doe,x,18,02.03.2024,B\n"
    )
    manifest = manifest_of(hospital, text)
    kept = {name for case in manifest.cases for name in case.attributes}
    assert {"who", "born", "Nachname", "Geburtsdatum", "Fall-Nr"} <= set(manifest.attributes.left_out)
    assert kept == {"number", "date_of_scan", "ward"}


def test_words_and_long_numbers_that_nobody_shares_stay_out(tmp_path):
    """In any language they name people; a measurement may be everybody's own."""
    folder = tmp_path / "ct"
    rows = ["patient_id,label,nimi,koodi,arvo,age_group"]
    for number in range(12):
        Ct(hu=SMALL, study=number + 1, patient=f"P{number}").write(folder / str(number))
        rows.append(f"P{number},{number % 2},Virtanen {number},{3000017 + number * 7},{0.37 * number:.2f},{number % 3}")
    manifest = manifest_of(folder, "\n".join(rows) + "\n")
    assert manifest.attributes.left_out == ("nimi", "koodi")
    assert set(manifest.attributes.kept) == {"arvo", "age_group"}


def test_cases_that_no_patient_id_names_are_counted(tmp_path):
    volumes(tmp_path / "ct")
    assert manifest_of(tmp_path / "ct", "path,label\n0.nii.gz,yes\n1.nii.gz,no\n").without_patient == 2
    named = manifest_of(tmp_path / "ct", "path,patient_id,label\n0.nii.gz,a,yes\n1.nii.gz,,no\n")
    assert named.without_patient == 1


def test_site_comes_from_the_named_column_or_from_the_header(hospital):
    text = "patient_id,label,manufacturer\nMueller-0815,yes,Acme\nSchmidt-4711,no,Apex\n"
    assert {c.site for c in manifest_of(hospital, text, site_column="manufacturer").cases} == {"Acme", "Apex"}
    assert {(c.site, c.site_source) for c in manifest_of(hospital, text).cases} == {("North", "InstitutionName")}


def test_unknown_site_column_gives_the_near_name(hospital):
    with pytest.raises(UsageError, match="Did you mean 'manufacturer'"):
        manifest_of(hospital, "patient_id,label,manufacturer\nMueller-0815,yes,A\n", site_column="manufacturers")


@pytest.mark.parametrize("key", ["patient_id", "sop_uid"])
def test_no_raw_identity_in_any_case(hospital, key):
    one, two = {"patient_id": ("Mueller-0815", "Schmidt-4711"), "sop_uid": (f"{UID}.1.1.1", f"{UID}.2.1.1")}[key]
    manifest = manifest_of(hospital, f"{key},PatientID,label\n{one},Mueller-0815,yes\n{two},Schmidt-4711,no\n")
    for case in manifest.cases:
        told = str({**asdict(case), "root": ""})
        assert not [canary for canary in CANARIES if canary in told]


def test_cases_are_the_same_in_another_run(hospital):
    text = "patient_id,label\nMueller-0815,yes\nSchmidt-4711,no\n"
    assert manifest_of(hospital, text).cases == manifest_of(hospital, text).cases


def test_classes_are_numbers_in_their_order_then_text(hospital):
    text = "\n".join(["sop_uid,label"] + [f"{UID}.1.1.{i + 1},{name}" for i, name in enumerate(["10", "2", "b", "1"])])
    assert manifest_of(hospital, text).classes == ("1", "2", "10", "b")


def test_flags_of_the_series_travel_with_the_case(tmp_path):
    Ct(edit=lambda d, i: setattr(d, "PhotometricInterpretation", "MONOCHROME1")).write(tmp_path)
    (case,), _ = unlabelled_cases(scan_folder(tmp_path))
    assert case.codes == (ReasonCode.MONO1,)
    assert case.acquisition["manufacturer"] == "Acme"
