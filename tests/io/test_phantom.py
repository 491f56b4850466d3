"""The phantom hospital: deterministic, readable by others, balanced, and with every fault it claims."""

import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medvit.io import phantom
from medvit.io.phantom import SITES, make_patients, render, write_hospital, write_series
from medvit.records import ReasonCode

SAMPLE_DATA = Path(__file__).parents[2] / "sample_data"


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "hospital"
    return write_hospital(folder, make_patients(6, seed=0), matrix=64, slices=8)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def dicom_files(hospital):
    """All that is DICOM, but the planted copy."""
    apart = {ReasonCode.DUP_IDENTICAL, ReasonCode.NOT_DICOM}
    files = {p.relative_to(hospital.folder).as_posix(): p for p in hospital.folder.rglob("*") if p.is_file()}
    return [path for key, path in files.items() if hospital.planted.get(key) not in apart]


def sitk_by_position(paths):
    """HU (Z, Y, X) and LPS affine as SimpleITK reads the slices in the order given."""
    image = sitk.ReadImage([str(path) for path in paths])
    matrix = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


def mean_at(hu, affine, where_mm, radius_mm):
    z, y, x = np.indices(hu.shape)
    world = np.stack([x, y, z], axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    return hu[np.linalg.norm(world - where_mm, axis=-1) < radius_mm].mean()


def test_same_seed_gives_the_same_bytes_and_another_seed_other_patients(tmp_path):
    for run in ("one", "two"):
        write_hospital(tmp_path / run / "hospital", make_patients(3, seed=5), matrix=64, slices=8)
    write_hospital(tmp_path / "other" / "hospital", make_patients(3, seed=6), faults=False, matrix=64, slices=8)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert set(tree(tmp_path / "one")) & set(tree(tmp_path / "other")) == {"labels.csv"}


@pytest.mark.parametrize("prevalence", [0.25, 0.5])
def test_label_is_independent_of_site_and_sex(prevalence):
    patients = make_patients(120, seed=0, prevalence=prevalence)
    cells = Counter((p.site.name, p.sex, p.finding) for p in patients)
    assert {cells[site.name, sex, True] for site in SITES for sex in "FM"} == {round(20 * prevalence)}
    assert len({p.patient_id for p in (*patients, *make_patients(120, seed=1))}) == 240


def test_six_patients_are_balanced_as_well():
    patients = make_patients(6, seed=0)
    for sex in "FM":
        assert {p.finding for p in patients if p.sex == sex} == {True, False}
    for site in SITES:
        assert {p.finding for p in patients if p.site == site} == {True, False}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
@pytest.mark.parametrize("prone", [False, True])
def test_simpleitk_reads_what_was_rendered(tmp_path, site, prone):
    patient = make_patients(1, seed=3, sites=(site,))[0]
    hu, affine = render(patient, matrix=64, slices=8)
    if prone:
        hu, affine = phantom.turn_prone(hu, affine)
    read, read_affine = sitk_by_position(write_series(tmp_path, hu, affine, patient))
    inside = read > -1500  # padding, at the site that pads, is far below air
    assert inside.mean() > (0.75 if site.padding else 0.999)
    np.testing.assert_array_equal(read[inside], hu[inside])
    np.testing.assert_allclose(read_affine, affine, atol=1e-4)


def test_pydicom_alone_gives_the_same_hu_whatever_the_intercept(tmp_path):
    intercepts = set()
    for patient in make_patients(9, seed=0):
        hu, affine = render(patient, matrix=48, slices=4)
        datasets = [pydicom.dcmread(path) for path in write_series(tmp_path / patient.patient_id, hu, affine, patient)]
        datasets.sort(key=lambda ds: ds.ImagePositionPatient[2])
        read = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in datasets])
        np.testing.assert_array_equal(read[:, 12:36, 12:36], hu[:, 12:36, 12:36])
        intercepts.add((float(datasets[0].RescaleIntercept), datasets[0].PixelRepresentation))
    assert intercepts == {(-1024, 0), (0, 1), (-1024, 1)}


def test_finding_is_at_the_known_place_and_only_there(tmp_path):
    excess = {}
    for patient in make_patients(12, seed=0):
        hu, affine = sitk_by_position(write_series(tmp_path / patient.patient_id, *render(patient), patient))
        mirrored = np.array(patient.finding_mm) * (-1, 1, 1)
        difference = mean_at(hu, affine, patient.finding_mm, 8) - mean_at(hu, affine, mirrored, 8)
        excess.setdefault(patient.finding, []).append(difference)
    assert np.mean(excess[True]) - np.mean(excess[False]) > 150


def test_anatomy_does_not_depend_on_the_label():
    patient = make_patients(12, seed=0)[3]
    assert patient.finding
    with_finding, affine = render(patient)
    without, _ = render(replace(patient, finding=False))
    z, y, x = np.nonzero(abs(with_finding - without) > 50)
    world = np.stack([x, y, z], axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    assert np.linalg.norm(world - patient.finding_mm, axis=-1).max() < 45


def test_slices_are_neither_in_file_order_nor_in_instance_order(hospital):
    for folder in (hospital.folder).glob("PA*/ST000000/SE000001"):
        headers = [pydicom.dcmread(p, stop_before_pixels=True, force=True) for p in sorted(folder.glob("IM?????"))]
        z = [ds.ImagePositionPatient[2] for ds in headers]
        assert z not in (sorted(z), sorted(z, reverse=True))
        assert [ds.InstanceNumber for ds in headers] == sorted(ds.InstanceNumber for ds in headers)


def test_every_uid_is_valid_and_every_instance_has_its_own(hospital):
    seen = Counter()
    for path in dicom_files(hospital):
        ds = pydicom.dcmread(path, force=True)
        uids = [element.value for element in ds.iterall() if element.VR == "UI"]
        assert all(pydicom.uid.UID(uid).is_valid for uid in uids)
        seen[ds.SOPInstanceUID] += 1
    assert set(seen.values()) == {1}


def test_every_planted_fault_is_there(hospital):
    codes = Counter(hospital.planted.values())
    assert codes == Counter([*phantom.DAMAGE, *phantom.JUNK])
    files = {key: code for key, code in hospital.planted.items() if (hospital.folder / key).is_file()}
    assert Counter(files.values()) == Counter(phantom.JUNK)
    by_series = {}
    for path in dicom_files(hospital):
        ds = pydicom.dcmread(path, force=True)
        by_series.setdefault(ds.SeriesInstanceUID, []).append((ds, path))
    damaged = {hospital.planted[uid]: by_series[uid] for uid in hospital.planted if uid in by_series}
    assert len(damaged[ReasonCode.SLICE_MISSING]) == 7
    gaps = np.diff(sorted(ds.ImagePositionPatient[2] for ds, _ in damaged[ReasonCode.SLICE_MISSING]))
    assert gaps.max() == pytest.approx(2 * gaps.min())
    assert sum(len(ds.PixelData) < 2 * 64 * 64 for ds, _ in damaged[ReasonCode.PIXEL_TRUNCATED]) == 1
    assert all("RescaleSlope" not in ds for ds, _ in damaged[ReasonCode.RESCALE_MISSING])
    uneven = np.diff(sorted(ds.ImagePositionPatient[2] for ds, _ in damaged[ReasonCode.SPACING_NONUNIFORM]))
    assert uneven.max() > 1.3 * np.median(uneven)
    assert {len(by_series[uid]) for uid in hospital.series} == {8}


def test_junk_is_what_it_says(hospital):
    kinds = {}
    for key, code in hospital.planted.items():
        if (hospital.folder / key).is_file() and code is not ReasonCode.NOT_DICOM:
            ds = pydicom.dcmread(hospital.folder / key)
            kinds[ds.Modality, ds.get("ImageType", ["", "", ""])[2]] = code
    assert kinds == {
        ("CT", "LOCALIZER"): ReasonCode.NOT_VOLUME,
        ("SR", ""): ReasonCode.NOT_VOLUME,
        ("MR", "OTHER"): ReasonCode.MODALITY,
        ("CT", "AXIAL"): ReasonCode.DUP_IDENTICAL,
    }


def test_labels_name_every_patient_once(hospital):
    header, *rows = hospital.labels.read_text(encoding="utf-8").splitlines()
    assert header == "patient_id,label,site,sex,age"
    assert len({row.split(",")[0] for row in rows}) == len(rows) == 6 + len(phantom.DAMAGE)


def test_without_faults_there_are_only_images(tmp_path):
    written = write_hospital(tmp_path / "export", make_patients(2, seed=0), faults=False, matrix=48, slices=4)
    assert written.planted == {}
    assert len(tree(written.folder)) == 8


def test_unknown_damage_names_the_known_ones(tmp_path):
    patient = make_patients(1, seed=0)[0]
    with pytest.raises(ValueError, match="SLICE_MISSING"):
        phantom.write_damaged_series(tmp_path, *render(patient, slices=2), patient, ReasonCode.LOSSY)


def test_sample_data_is_what_its_script_writes(tmp_path):
    runpy.run_path(str(SAMPLE_DATA / "make.py"))["main"](tmp_path)
    made = tree(tmp_path)
    assert sum(map(len, made.values())) < 2_000_000
    kept = {
        path: content
        for path, content in tree(SAMPLE_DATA).items()
        if not path.startswith(("make.py", "README.md", "__pycache__"))
    }
    assert set(kept) == set(made)
    assert [path for path in made if kept[path] != made[path]] == []
