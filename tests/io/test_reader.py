"""read: one door for a listed series, a file and a folder."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from ct_builder import Ct, assert_is_phantom

import medvit.io
from medvit.io import read, read_files, scan_folder
from medvit.records import ReasonCode, ScanError, UsageError


def test_series_file_and_folder_give_the_same_scan(tmp_path):
    paths = Ct().write(tmp_path)
    for scan in (read(scan_folder(tmp_path).series[0]), read(tmp_path), read(str(tmp_path)), read_files(paths[::-1])):
        assert_is_phantom(scan)


def test_a_folder_with_two_series_is_wrong_usage(tmp_path):
    Ct().write(tmp_path, "a{}")
    Ct(uid=2).write(tmp_path, "b{}")
    with pytest.raises(UsageError, match="saw 2"):
        read(tmp_path)


def scattered(dataset, index):
    dataset.ImagePositionPatient = [-12.5, -40, float(index**2)]


def test_a_folder_with_one_faulty_series_raises_its_fault(tmp_path):
    Ct(edit=scattered).write(tmp_path)
    with pytest.raises(ScanError) as caught:
        read(tmp_path)
    assert caught.value.code is ReasonCode.SPACING_NONUNIFORM


def test_slices_of_two_series_are_not_merged(tmp_path):
    paths = Ct().write(tmp_path, "a{}") + Ct(uid=2, patient="Schmidt-7").write(tmp_path, "b{}")
    with pytest.raises(ScanError) as caught:
        read_files(paths)
    assert caught.value.code is ReasonCode.PATIENT_CONFLICT


def test_the_error_crosses_processes_and_names_no_patient(tmp_path):
    Ct(edit=scattered).write(tmp_path)
    (series,) = scan_folder(tmp_path).series
    with pytest.raises(ScanError) as caught:
        read(series)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.code, again.files, str(again)) == (caught.value.code, caught.value.files, str(caught.value))
    assert "Mueller" not in str(again)
    assert len(again.files) == 12


def test_public_names_exist():
    assert {"scan_folder", "read", "read_files", "reorient_lps", "Series", "Inventory"} <= set(medvit.io.__all__)
    assert all(hasattr(medvit.io, name) for name in medvit.io.__all__)


def test_reading_imports_neither_torch_nor_monai():
    code = "import sys, medvit.io; medvit.io.read; print({'torch', 'monai', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_affine_maps_voxel_order_x_y_z(tmp_path):
    Ct().write(tmp_path)
    scan = read(tmp_path)
    np.testing.assert_allclose(scan.affine @ (3, 5, 7, 1), (-12.5 + 2.7, -40 + 3.5, 107.25 + 17.5, 1), atol=1e-6)
    assert scan.hu[7, 5, 3] == -1000 + 33 + 15 + 280
