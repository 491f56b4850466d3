import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from medvit import io
from medvit.cli import inspect
from medvit.cli.listing import Filters, make_listing, to_document
from medvit.cli.listing_tables import show
from medvit.io import FileEntry, phantom
from medvit.records import REASONS, Outcome, ReasonCode, ScanHeader


@pytest.fixture
def shown(capsys):
    """Run the command, and give (exit code, what it said)."""

    def run(*arguments):
        status = inspect.main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return status, streams.out + streams.err

    return run


@pytest.fixture
def document(capsys):
    """Run the command with --json, and give the document."""

    def run(*arguments):
        inspect.main([*(str(argument) for argument in arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two studies: one of three series, one of one series that lacks a slice."""
    folder = tmp_path_factory.mktemp("studies")
    patient, other, _ = phantom.make_patients(3, 21)
    for description, matrix, slices in (("LOCAL", 32, 4), ("FULL", 32, 9), ("FULL FINE", 48, 9)):
        hu, affine = phantom.render(patient, matrix=matrix, slices=slices)
        phantom.write_series(folder / "a" / description, hu, affine, patient, description=description)
    hu, affine = phantom.render(other, matrix=32, slices=9)
    phantom.write_damaged_series(folder / "b", hu, affine, other, ReasonCode.SLICE_MISSING)
    return folder


def study_uid(folder: Path) -> str:
    return str(pydicom.dcmread(min(folder.rglob("IM*"))).StudyInstanceUID)


def run_fresh(*arguments):
    """What a new interpreter has loaded after the command."""
    script = (
        "import sys; from medvit.cli import inspect; status = inspect.main(sys.argv[1:]); "
        "heavy = {'torch', 'monai', 'timm', 'pandas', 'matplotlib', 'cv2', 'pydicom'} & set(sys.modules); "
        "print('loaded', sorted(heavy), status)"
    )
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_explains_every_code_and_imports_nothing_heavy():
    text = run_fresh("-h")
    assert "loaded [] 0" in text
    assert all(code in text for code in ReasonCode)
    assert "axial before not" in text


def test_listing_imports_neither_torch_nor_monai_nor_what_only_pictures_need(site):
    assert "loaded ['pydicom'] 3" in run_fresh(str(site.folder))


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


def test_every_key_of_the_json_is_explained(site, document, tmp_path, capsys):
    found = document(site.folder, "--study", study_uid(site.folder), "--pictures", tmp_path / "sheet.png")
    inspect.main(["-h"])
    text = capsys.readouterr().out
    for key in [*found, *found["series"][0], *found["set_aside"][0], *found["study"], *found["pictures"]]:
        assert re.search(rf"\b{key}\b", text), key


def test_table_shows_what_an_engineer_asks_for(site, shown):
    _, text = shown(site.folder)
    assert "files seen" in text
    assert REASONS[ReasonCode.SLICE_MISSING].remedy in text
    assert text.count("axial before not") == 1
    with site.labels.open() as file:
        sites = {row["site"] for row in csv.DictReader(file)}
    for words in (*sites, "CHEST AXIAL", "B70f", "ok, chosen", "quarantine", "SLICE_MISSING: 1 missing"):
        assert words in text


def test_table_fits_80_columns_and_keeps_its_words(studies, shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "80")
    _, text = shown(studies)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    table = plain[plain.index("#") : plain.index("Of each study")].splitlines()
    assert max(map(len, table)) <= 80
    for words in ("FULL FINE", "9×48×48", "SLICE_MISSING", "quarantine"):
        assert words in "\n".join(table)


def test_one_series_of_a_study_is_chosen_by_the_rule(studies, document, shown):
    series = document(studies)["series"]
    assert {one["description"]: one["chosen"] for one in series if one["outcome"] == "ok"} == {
        "LOCAL": False,  # fewer slices
        "FULL": False,  # smaller matrix
        "FULL FINE": True,
    }
    assert [one["number"] for one in series] == [1, 2, 3, 4]
    assert not any(one["chosen"] for one in series if one["outcome"] == "quarantine")
    assert shown(studies)[1].count("…" + study_uid(studies / "a")[-6:]) == 1  # named once, for the three together


def test_phases_that_share_a_series_are_told_apart():
    first = io.Series(
        uid="1.2.3", study_uid="1.2", root=Path(), outcome=Outcome.FLAG, codes=(ReasonCode.MULTIPHASE,),
        files=("a",), shape=(20, 512, 512), header=ScanHeader(phase="kernel B30f"),
    )  # fmt: skip
    second = replace(first, part=1, files=("b",), shape=(40, 512, 512), header=ScanHeader(phase="kernel B60f"))
    entries = tuple(FileEntry(name, Outcome.FLAG, ReasonCode.MULTIPHASE, series_uid="1.2.3") for name in "ab")
    series = to_document(make_listing(io.Inventory(Path(), (first, second), entries), Filters()))["series"]
    assert [(one["number"], one["part"], one["phase"], one["chosen"]) for one in series] == [
        (1, 0, "kernel B30f", False),
        (2, 1, "kernel B60f", True),
    ]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--description", "full"], {"FULL", "FULL FINE"}),
        (["--description", "fine", "--kernel", "no such"], set()),
        (["--study", "{a}", "--description", "local"], {"LOCAL"}),
    ],
)
def test_filters_hide_series_and_keep_the_account(arguments, left, studies, document, shown):
    given = [argument.format(a=study_uid(studies / "a")) for argument in arguments]
    everything, some = document(studies), document(studies, *given)
    assert {one["description"] for one in some["series"]} == left
    assert some["hidden_series"] == 4 - len(left)
    for key in ("files", "codes", "set_aside"):
        assert some[key] == everything[key]
    numbers = {one["series_uid"]: one["number"] for one in everything["series"]}
    assert all(one["number"] == numbers[one["series_uid"]] for one in some["series"])
    status, text = shown(studies, *given)
    assert status == 3
    assert f"{4 - len(left)} more hidden by the filter" in text


@pytest.mark.parametrize(
    ("given", "matches"),
    [("6", {6}), ("4-6", {4, 6}), ("-5", {4}), ("5-", {6}), ("4.2-5.8", set()), ("4.004", {4})],
)
def test_thickness_takes_a_value_or_a_range(given, matches, site, document):
    series = document(site.folder, "--thickness", given)["series"]
    assert {one["slice_thickness_mm"] for one in series} == matches


@pytest.mark.parametrize("given", ["x", "-", "3-1", "nan", "", "1-2-3"])
def test_a_thickness_that_is_none_ends_with_2(given, site, shown):
    status, text = shown(site.folder, "--thickness", given)
    assert status == 2
    assert "at most" in text


def test_long_lists_are_short_on_the_screen_and_whole_in_json(tmp_path, shown, document):
    phantom.write_hospital(tmp_path / "h", phantom.make_patients(3, 1), faults=False, matrix=32, slices=4)
    for number in range(1200):
        (tmp_path / "h" / f"bad{number:04d}.dcm").write_text("no image")
    _, text = shown(tmp_path / "h")
    assert "and 1,197 more: --json lists all" in text
    assert text.count(".dcm") == 3
    assert len(document(tmp_path / "h")["set_aside"]) == 1200


def test_headers_and_file_names_are_shown_not_obeyed(tmp_path, shown):
    patient = phantom.make_patients(3, 1)[0]
    hu, affine = phantom.render(patient, matrix=32, slices=4)
    phantom.write_series(tmp_path / "ct", hu, affine, patient, description="[red]GATED[/red]")
    (tmp_path / "ct" / "clear\x1b[2Jscreen.txt").write_text("no image")
    _, text = shown(tmp_path / "ct")
    assert "[red]GATED[/red]" in text
    assert "\x1b" not in text
    assert "screen.txt" in text


def test_a_listing_does_not_end_where_the_terminal_has_no_such_letter(studies):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "medvit.cli", "inspect", str(studies)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "files seen" in done.stdout


def test_a_hostile_description_reaches_no_terminal(capsys):
    header = ScanHeader(description="clear\x1b[2Jscreen\u202eback")
    series = io.Series(uid="1.2.3", study_uid="1.2", root=Path(), outcome=Outcome.OK, files=("a",), header=header)
    show(make_listing(io.Inventory(Path(), (series,), (FileEntry("a", Outcome.OK),)), Filters()))
    text = capsys.readouterr().out
    assert "screen" in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_kernel_is_found_in_any_case(site, document):
    assert {one["kernel"] for one in document(site.folder, "--kernel", "b70")["series"]} == {"B70f"}


def test_study_says_why_there_is_nothing(studies, shown, document):
    uid = study_uid(studies / "b")
    status, text = shown(studies, "--study", uid)
    assert status == 3
    assert f"Nothing of this study is used: its CT is set aside ({ReasonCode.SLICE_MISSING})" in text
    assert REASONS[ReasonCode.SLICE_MISSING].remedy in text
    assert "FULL" not in text
    files = document(studies, "--study", uid)["study"]["files"]
    assert {entry["path"] for entry in files} == {f"b/{path.name}" for path in (studies / "b").iterdir()}
    assert {entry["code"] for entry in files} == {"SLICE_MISSING"}


def test_study_shows_what_is_used_too(studies, shown, document):
    numbers = {one["description"]: one["number"] for one in document(studies)["series"] if one["outcome"] == "ok"}
    used, others = numbers.pop("FULL FINE"), ", ".join(str(number) for number in sorted(numbers.values()))
    status, text = shown(studies, "--study", study_uid(studies / "a"))
    assert status == 3  # the exit code is of the folder
    assert f"Series {used} is what medvit uses of this study; not chosen: {others}." in text


def test_study_takes_the_ending_that_the_table_shows(studies, document, shown):
    uid = study_uid(studies / "b")
    ending = next(word for word in shown(studies)[1].split() if word.startswith("…") and uid.endswith(word[1:]))
    for given in (ending, ending[1:]):
        assert document(studies, "--study", given)["study"]["study_uid"] == uid


def test_an_ambiguous_ending_lists_what_it_may_mean(site, shown):
    status, text = shown(site.folder, "--study", "")  # no study asked for
    assert (status, "error" in text) == (3, False)
    ends = [path.name for path in site.folder.iterdir() if path.is_dir()]
    common = {study_uid(site.folder / name)[-1] for name in ends}
    digit = next(d for d in common if sum(study_uid(site.folder / name).endswith(d) for name in ends) > 1)
    status, text = shown(site.folder, "--study", digit)
    assert status == 2
    assert "studies end so" in text


def test_an_unknown_study_is_2_and_tells_what_could_not_be_read(tmp_path, shown):
    hospital = phantom.write_hospital(tmp_path / "h", phantom.make_patients(3, 1), faults=False, matrix=32, slices=4)
    for number in range(3):
        (hospital.folder / f"bad{number}.dcm").write_text("no image")
    (hospital.folder / "notes.txt").write_text("belongs to nothing")
    uid = study_uid(hospital.folder)
    typo = uid[:-1] + str((int(uid[-1]) + 1) % 10)
    status, text = shown(hospital.folder, "--study", typo)
    assert status == 2
    assert "no file of this study was seen among 16 files" in text
    assert "3 files do not tell their study and may belong to it: 3 NOT_DICOM" in text
    assert f"Near: {uid}" in text
    _, text = shown(hospital.folder, "--study", hospital.series[0])
    assert "It is a SeriesInstanceUID" in text


def test_study_without_ct_shows_its_files(site, shown):
    path = next(name for name, code in site.planted.items() if code == ReasonCode.MODALITY)
    status, text = shown(site.folder, "--study", pydicom.dcmread(site.folder / path).StudyInstanceUID)
    assert status == 3
    assert path in text
    assert "it holds no CT volume (MODALITY)" in text


def test_deidentify_shows_no_path(site, shown, document, tmp_path):
    uid = study_uid(site.folder)
    names = {part for path in site.folder.rglob("*") for part in path.relative_to(site.folder).parts}
    for arguments in ([], ["--study", uid], ["--json"], ["--study", uid, "--json"], ["--study", "1.2.3"]):
        _, text = shown(site.folder, *arguments, "--deidentify")
        assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
        assert str(site.folder) not in text
    entries = document(site.folder)["set_aside"]
    hashed = document(site.folder, "--deidentify")["set_aside"]
    assert len({entry["path"] for entry in hashed}) == len(entries)
    status, text = shown(tmp_path / "SMITH", "--deidentify")
    assert status == 2
    assert "SMITH" not in text


def test_deidentify_hashes_paths_that_are_no_text(tmp_path, shown, monkeypatch):
    """A CD written by another system has names in its own character set."""
    monkeypatch.setenv("MEDVIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / os.fsdecode(b"J\xf6rg")
    folder.mkdir()
    names = [os.fsdecode(name) for name in (b"M\xfcller", b"M\xe4ller")]
    for name in names:
        (folder / name).write_bytes(b"no image")
    _, text = shown(folder, "--deidentify")
    assert "2 files   reject" in text
    assert "ller" not in text


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
    assert [series["chosen"] for series in document["series"]] == [True]


@pytest.mark.realdata
def test_all_real_data_is_accounted_for(real_data, document):
    found = document(real_data)
    assert found["files"]["seen"] == sum(1 for path in real_data.rglob("*") if path.is_file())
    assert len({one["study_uid"] for one in found["series"] if one["chosen"]}) == len(
        {one["study_uid"] for one in found["series"]}
    )
