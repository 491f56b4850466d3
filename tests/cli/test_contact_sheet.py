"""The contact sheet: right way up, right shape, and nothing on it that names a patient."""

import json
import shutil

import cv2
import numpy as np
import pydicom
import pytest

from medvit.cli import inspect
from medvit.cli.contact_sheet import middle_slice, window_of
from medvit.io import phantom
from medvit.records import Scan


@pytest.fixture(scope="module")
def patient():
    return phantom.make_patients(3, 11)[0]


@pytest.fixture
def study(tmp_path, patient):
    """Two series of one study."""
    for name, slices in (("CHEST AXIAL", 6), ("CHEST THICK", 4)):
        hu, affine = phantom.render(patient, matrix=32, slices=slices)
        phantom.write_series(tmp_path / "ct" / name, hu, affine, patient, description=name)
    return tmp_path / "ct"


def _marked(rows, columns, slices):
    """A volume stored along the given LPS directions, 1 × 2 × 3 mm, bright where the patient's head, front left is."""
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([columns, rows, slices]) * (1, 2, 3)
    hu = np.zeros((6, 8, 10), np.float32)
    z, y, x = np.indices(hu.shape)
    left, back, head = np.einsum("ij,jzyx->izyx", affine[:3, :3], np.stack([x, y, z]).astype(float))
    hu[(left > (left.min() + left.max()) / 2) & (back < back.mean()) & (head > (head.min() + head.max()) / 2)] += 500
    hu[(left > (left.min() + left.max()) / 2) & (back < back.mean())] += 250
    hu[head > (head.min() + head.max()) / 2] += 250
    return Scan(hu=hu, affine=affine)


L, P, S = np.eye(3)


@pytest.mark.parametrize(
    ("columns", "rows", "slices", "aspect"),
    [(L, P, S, 2), (-L, -P, S, 2), (P, L, S, 0.5), (L, P, -S, 2)],
)
def test_axial_slices_have_front_up_and_patient_left_on_the_right(columns, rows, slices, aspect):
    plane, ratio = middle_slice(_marked(rows, columns, slices))
    down, across = np.unravel_index(plane.argmax(), plane.shape)
    assert down < plane.shape[0] / 2
    assert across >= plane.shape[1] / 2
    assert ratio == pytest.approx(aspect)


@pytest.mark.parametrize(("columns", "rows", "slices"), [(L, -S, P), (L, S, P), (P, -S, L), (P, S, -L)])
def test_coronal_and_sagittal_slices_have_the_head_up(columns, rows, slices):
    plane, ratio = middle_slice(_marked(rows, columns, slices))
    assert plane.shape == (8, 10)
    assert plane[:4].mean() > plane[4:].mean()
    assert ratio == pytest.approx(2)


def test_heads_are_looked_at_in_the_brain_window():
    assert [window_of(part) for part in ("HEAD", "Brain", "CHEST", "")] == ["brain", "brain", *["soft_tissue"] * 2]


def test_sheet_shows_each_usable_series_and_says_so(study, tmp_path, capsys):
    assert inspect.main([str(study), "--pictures", str(tmp_path / "sheet.png")]) == 0
    assert "pictures of 2 series" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "sheet.png"), cv2.IMREAD_GRAYSCALE)
    left, right = np.array_split(picture, 2, axis=1)
    assert left[150:-50].max() > 200  # bone on black
    assert right[150:-50].max() > 200


def test_sheet_does_not_change_with_who_the_patient_is(study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study, other)
    for path in filter(lambda path: path.is_file(), other.rglob("*")):
        ds = pydicom.dcmread(path)
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Canary^Carla", "CANARY", "19110911", "O"
        ds.InstitutionName, ds.AccessionNumber, ds.StudyDate = "CANARY HOUSE", "CANARY", "19110912"
        ds.StudyInstanceUID, ds.SeriesDescription = "1.2.911", "CANARY " + str(ds.SeriesDescription)
        ds.save_as(path)
        path.rename(path.with_name("CANARY" + path.name))
    sheets = [tmp_path / "a.png", tmp_path / "b.png"]
    for folder, sheet in zip((study, other), sheets, strict=True):
        assert inspect.main([str(folder), "--pictures", str(sheet)]) == 0
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_unreadable_pixels_are_one_tile_an_entry_and_exit_code_3(study, tmp_path, capsys):
    for path in (study / "CHEST THICK").iterdir():
        ds = pydicom.dcmread(path)
        ds.PixelData = bytes(len(ds.PixelData))  # constant: no CT, which no header tells
        ds.save_as(path)
    assert inspect.main([str(study), "--json"]) == 0
    series = json.loads(capsys.readouterr().out)["series"]
    number = next(one["number"] for one in series if one["description"] == "CHEST THICK")
    arguments = [str(study), "--pictures", str(tmp_path / "sheet.png")]
    assert inspect.main([*arguments, "--json"]) == 3
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    assert pictures["drawn"] == 2
    assert [(failed["number"], failed["code"]) for failed in pictures["failed"]] == [(number, "HU_IMPLAUSIBLE")]
    assert inspect.main(arguments) == 3
    assert f"series {number} is not readable: HU_IMPLAUSIBLE" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "sheet.png")).astype(int)
    assert (picture[..., 2] - picture[..., 0]).max() > 100  # the code, in red


def test_filters_hold_for_pictures_and_an_empty_choice_writes_none(study, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert inspect.main([str(study), "--pictures", str(sheet), "--description", "no such"]) == 0
    assert not sheet.exists()
    assert "no pictures" in capsys.readouterr().out
    inspect.main([str(study), "--pictures", str(sheet), "--description", "thick"])
    assert "pictures of 1 series" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sheet.jpg", "nowhere/sheet.png"])
def test_a_picture_that_cannot_be_written_stops_before_reading(name, tmp_path, capsys):
    assert inspect.main([str(tmp_path), "--pictures", str(tmp_path / name)]) == 2
    assert "--pictures" in capsys.readouterr().err


@pytest.mark.realdata
def test_real_heads_are_in_the_middle_of_their_tile_and_show_brain(real_data, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert inspect.main([str(real_data / "ct_ich/hospital/p049"), "--pictures", str(sheet)]) == 0
    picture = cv2.imread(str(sheet), cv2.IMREAD_GRAYSCALE)
    centre = picture[picture.shape[0] // 2 - 40 :][:120, picture.shape[1] // 2 - 60 :][:, :120]
    assert 60 < centre.mean() < 190  # brain is grey in the brain window, nearly uniform in the soft tissue one
