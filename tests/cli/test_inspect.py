import json
import subprocess
import sys
from pathlib import Path

import pytest

from medvit.cli import inspect
from medvit.io import phantom
from medvit.records import REASONS, ReasonCode


def test_help_explains_every_code_and_imports_neither_torch_nor_monai():
    script = (
        "import sys; from medvit.cli import inspect; status = inspect.main(['-h']); "
        "heavy = {'torch', 'monai', 'timm', 'pandas', 'pydicom'} & set(sys.modules); print('loaded', heavy, status)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "loaded set() 0" in shown
    assert all(code in shown for code in ReasonCode)


def test_json_accounts_for_every_file_and_names_every_planted_fault(site, capsys):
    assert inspect.main([str(site.folder), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    files = document["files"]
    assert files["seen"] == sum(1 for path in site.folder.rglob("*") if path.is_file())
    assert files["seen"] == sum(count for name, count in files.items() if name != "seen")
    found = {}
    for entry in document["set_aside"]:
        assert entry["remedy"]
        found[entry["series_uid"] if entry["series_uid"] in site.planted else entry["path"]] = entry["code"]
    assert found == site.planted


def test_table_shows_counts_and_remedies(site, capsys):
    inspect.main([str(site.folder)])
    shown = capsys.readouterr().out
    assert "files seen" in shown
    assert REASONS[ReasonCode.SLICE_MISSING].remedy[:20] in shown


def test_deidentify_shows_no_path(site, capsys):
    inspect.main([str(site.folder), "--json", "--deidentify"])
    shown = capsys.readouterr().out
    assert "PA" not in {part[:2] for entry in json.loads(shown)["set_aside"] for part in entry["path"].split("/")}


def test_clean_folder_ends_with_0(tmp_path):
    phantom.write_hospital(tmp_path / "clean", phantom.make_patients(3, 1), faults=False, matrix=32, slices=4)
    assert inspect.main([str(tmp_path / "clean"), "--json"]) == 0


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "no CT"])
def test_nothing_to_inspect_ends_with_2_and_says_what_to_do(kind, tmp_path: Path, capsys):
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("x")
    elif kind != "missing":
        folder.mkdir()
    if kind == "no CT":
        (folder / "notes.txt").write_text("no image")
    assert inspect.main([str(folder)]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.realdata
def test_real_export_is_one_volume_and_two_localizers(real_data, capsys):
    assert inspect.main([str(real_data / "pet_ct_volume"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [series["shape_zyx"] for series in document["series"]] == [[174, 512, 512]]
    assert document["codes"]["NOT_VOLUME"]["files"] == 2
