import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import medvit
from medvit import io
from medvit.cli import predict, train
from tests.cli.conftest import TINY


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def test_run_folder_is_complete_and_holds_no_identity(trained, site):
    names = {path.name for path in trained.iterdir()}
    assert {
        "config.yaml",
        "cases.csv",
        "identities.csv",
        "metrics.jsonl",
        "checkpoints",
        "bundle",
        "predictions.csv",
        "report",
    } <= names
    identity = {row["patient_id"] for row in rows(site.labels)}
    for path in trained.rglob("*"):
        if path.is_file() and path.suffix in {".csv", ".json", ".jsonl", ".yaml", ".html"}:
            text = path.read_text(encoding="utf-8-sig")
            assert not any(name in text for name in identity), path
        assert not any(name in path.name for name in identity)


def test_each_patient_stands_on_one_side_and_test_cases_are_predicted_once(trained):
    cases = rows(trained / "cases.csv")
    assert len({row["patient_id"] for row in cases}) == len(cases)
    held_out = {row["case_id"] for row in cases if row["split"] == "test"}
    predicted = [row["case_id"] for row in rows(trained / "predictions.csv")]
    assert sorted(predicted) == sorted(held_out)


def test_seed_of_the_config_decides_who_is_held_out(train_tiny, trained, tmp_path):
    assert train_tiny(tmp_path / "run", "training.seed=1", "training.stages.0.epochs=1") == 3
    first, second = (
        {row["case_id"]: row["split"] for row in rows(run / "cases.csv")} for run in (trained, tmp_path / "run")
    )
    assert first.keys() == second.keys()
    assert first != second


def test_metrics_have_one_row_per_epoch(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "val_auroc", "val_loss", "lr"} <= set(lines[0])


def test_report_tells_what_the_model_looked_at_and_how_long_it_takes(trained):
    numbers = json.loads((trained / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert numbers["latency"]["cases"] > 0
    assert [one["epochs"] for one in numbers["learning"]] == [2]
    assert 0 < numbers["explanation"]["cases"] <= numbers["explanation"]["available"]
    assert "data:image/png" in (trained / "report" / "report.html").read_text(encoding="utf-8")


def test_the_model_card_travels_with_the_bundle(trained):
    card = json.loads((trained / "bundle" / "model_card.json").read_text(encoding="utf-8"))
    assert card["model"]["weights_sha256"] == medvit.load_bundle(trained).info.weights_sha256
    assert card["data"]["cases"] == len(rows(trained / "cases.csv"))
    assert card["evaluation"]["cases"] == len(rows(trained / "predictions.csv"))
    assert "FILL IN" in (trained / "bundle" / "model_card.md").read_text(encoding="utf-8")


def test_bundle_predicts_what_the_run_wrote(trained, site):
    model = medvit.load_bundle(trained)
    written = {row["series_uid"]: float(row["p_1"]) for row in rows(trained / "predictions.csv")}
    series = next(one for one in io.scan_folder(site.folder).series if one.uid in written)
    (prediction,) = model.predict([io.read(series)])
    assert prediction.probabilities["1"] == pytest.approx(written[series.uid], abs=1e-5)


@pytest.mark.parametrize("tuning", ["synqt", "lora"])
def test_a_tuned_backbone_is_trained_judged_and_served_as_any_other(tuning, train_tiny, site, tmp_path, capfd):
    stages = "[{name: head, trainable: head, epochs: 1}, {name: all, epochs: 1, size: 48}, {name: end, epochs: 1}]"
    more = (f"model.tuning={tuning}", f"training.stages={stages}")
    assert train_tiny(tmp_path / "run", *more) == 3
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
    assert predict.main([str(site.folder), "--model", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 3
    served = {row["study_uid"]: float(row["p_1"]) for row in rows(tmp_path / "out" / "predictions.csv")}
    assert len(served) == site.patients
    assert len(list((tmp_path / "out" / "sc").iterdir())) == site.patients
    # what it has learned is beside the model's weights: to start from them alone would be to start anew, unsaid
    assert train_tiny(tmp_path / "second", *more, f"model.weights={tmp_path / 'run'}") == 2
    assert f"tuned by {tuning}" in capfd.readouterr().err


def test_folds_predict_every_case_out_of_fold(train_tiny, site, tmp_path):
    assert train_tiny(tmp_path / "run", "data.folds=3", "training.stages.0.epochs=1") == 3
    predictions = rows(tmp_path / "run" / "predictions.csv")
    assert len(predictions) == site.patients
    assert {row["fold"] for row in predictions} == {"0", "1", "2"}


def test_dry_run_writes_nothing(train_tiny, tmp_path, capfd):
    assert train_tiny(tmp_path / "run", "--dry-run", "data.cache_dir=" + str(tmp_path / "cache")) == 0
    assert not (tmp_path / "run").exists()
    shown = capfd.readouterr().err
    assert "split:" in shown
    assert "minutes" in shown
    assert shown.splitlines()[-1].endswith(f"kept in {tmp_path / 'cache'}")


def test_a_run_begins_with_the_pixels_that_its_dry_run_kept(train_tiny, tmp_path, capfd):
    """They made the folder: it was "not empty", and --resume found no run in it."""
    run = tmp_path / "run"
    assert train_tiny(run, "--dry-run") == 0
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"kept in {run / 'cache'}; a run with --output {run} begins" in last
    kept = {path: path.stat().st_mtime_ns for path in (run / "cache").iterdir()}
    assert kept
    assert train_tiny(run, "training.stages.0.epochs=1") == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert train_tiny(run, "training.stages.0.epochs=1") == 2
    assert "not empty" in capfd.readouterr().err


def test_killed_run_continues_to_the_same_predictions(site, trained, tmp_path):
    output = tmp_path / "run"
    arguments = [str(site.folder), "--labels", str(site.labels), "--output", str(output), *TINY]
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "medvit.cli", "train", *arguments])
    checkpoint = output / "checkpoints" / "fold0" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert train.main([*arguments]) == 2  # an existing run is not overwritten
    assert train.main([*arguments, "--resume"]) == 3
    continued = {row["case_id"]: row["p_1"] for row in rows(output / "predictions.csv")}
    assert continued == {row["case_id"]: row["p_1"] for row in rows(trained / "predictions.csv")}


def test_resume_with_other_settings_is_refused(train_tiny, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert train_tiny(tmp_path / "run", "--resume", "training.seed=5") == 2
    assert "other settings" in capsys.readouterr().err


def test_given_split_that_leaks_a_patient_ends_with_4(site, tmp_path, capsys):
    found = io.scan_folder(site.folder)
    usable = [series for series in found.series if series.usable]
    first = usable[0]
    files = [(name, first.uid) for name in first.files] + [(s.files[0], s.uid) for s in usable[1:]]
    with (tmp_path / "labels.csv").open("w") as stream:
        stream.write("path,label,split\n")
        for number, (name, _) in enumerate(files):
            stream.write(f"{site.folder / name},{number % 2},{('train', 'val', 'test')[number % 3]}\n")
    arguments = [str(site.folder), "--labels", str(tmp_path / "labels.csv"), "--output", str(tmp_path / "run"), *TINY]
    assert train.main(arguments) == 4
    assert "LEAKAGE" in capsys.readouterr().err


def labels(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def table(site, change) -> str:
    lines = site.labels.read_text().splitlines()
    return "\n".join(change(lines)) + "\n"


WRONG_LABELS = {
    "no key column": (lambda lines: ["name,label", "a,1", "b,0"], "no key column"),
    "no match": (lambda lines: ["patient_id,label", "nobody,1", "noone,0"], "none of 2 rows matches"),
    "one class": (lambda lines: [lines[0], *(row.replace(",0,", ",1,") for row in lines[1:])], "two classes"),
    "no label column": (lambda lines: [lines[0].replace("label", "finding"), *lines[1:]], "no column 'label'"),
    "contradiction": (lambda lines: [*lines, lines[1].replace(",0,", ",9,").replace(",1,", ",9,")], "contradict"),
    "empty": (lambda lines: [lines[0]], "no rows"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_end_with_2_and_say_what_is_needed(name, site, tmp_path, capsys):
    change, message = WRONG_LABELS[name]
    path = labels(tmp_path / "labels.csv", table(site, change))
    assert train.main([str(site.folder), "--labels", str(path), "--output", str(tmp_path / "run"), *TINY]) == 2
    assert message in capsys.readouterr().err


def test_key_columns_that_contradict_each_other_name_the_lines(site, tmp_path, capsys):
    series = [one for one in io.scan_folder(site.folder).series if one.usable]
    text = "series_uid,patient_id,label\n" + "".join(f"{s.uid},WRONG,{n % 2}\n" for n, s in enumerate(series))
    path = labels(tmp_path / "labels.csv", text)
    assert train.main([str(site.folder), "--labels", str(path), "--output", str(tmp_path / "run"), *TINY]) == 2
    shown = capsys.readouterr().err
    assert "'patient_id' contradicts" in shown
    assert "line 2" in shown


def weights_file(path: Path, kind: str, trained: Path) -> Path:
    if kind == "truncated":
        whole = (trained / "bundle" / "model.safetensors").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "other":
        save_file({k: v for k, v in load_file(trained / "bundle" / "model.safetensors").items() if "blocks" in k}, path)
    return path


WRONG_SETTINGS = {
    "unknown key": (["training.batchsize=3"], "training.batch_size"),
    "unknown section": (["trainer.epochs=3"], "unknown config key"),
    "too few patients": (["data.folds=40"], "data.folds"),
    "no config": (["--config", "nowhere.yaml"], "no such file"),
    "unknown model": (["model.name=vit_nonsense"], "timm cannot build"),
    "size": (["preprocessing.size=30"], "no multiple"),
    "two splits": (["data.folds=3", "data.holdout_sites=[Hill University]"], "leave out data.folds"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings_end_with_2(name, train_tiny, tmp_path, capsys):
    extra, message = WRONG_SETTINGS[name]
    assert train_tiny(tmp_path / "run", *extra) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message"), [("missing", "no such file"), ("truncated", "cut short"), ("other", "fit")]
)
def test_wrong_weights_end_with_2(kind, message, train_tiny, trained, tmp_path, capsys):
    path = weights_file(tmp_path / "weights.safetensors", kind, trained)
    assert train_tiny(tmp_path / "run", f"model.weights={path}") == 2
    assert message in capsys.readouterr().err


def test_unreachable_hub_ends_with_2(site, tmp_path):
    arguments = [str(site.folder), "--labels", str(site.labels), "--output", str(tmp_path / "run"), *TINY]
    command = [sys.executable, "-m", "medvit.cli", "train", *arguments, "model.weights=hub", "model.options={}"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "MEDVIT_SITE_KEY": "test", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hub is not reachable" in done.stderr


def test_folder_without_ct_ends_with_2(tmp_path, site, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.txt").write_text("nothing")
    arguments = [str(tmp_path / "folder"), "--labels", str(site.labels), "--output", str(tmp_path / "run"), *TINY]
    assert train.main(arguments) == 2
    assert "no CT" in capsys.readouterr().err


TOWARDS_HARBOUR = [
    "data.target_sites=[Harbour Hospital]",
    "data.test_fraction=0.5",
    "data.validation_fraction=0.5",
    "training.stages.0.epochs=1",
]


def test_adaptation_tells_source_and_target_apart(train_tiny, tmp_path, capfd):
    run = tmp_path / "run"
    assert train_tiny(run, *TOWARDS_HARBOUR, "objective.name=dann") == 3
    found = json.loads((run / "adaptation.json").read_text())
    assert {"source", "target", "oracle", "oracle_epoch", "domain_probe", "mmd", "lost"} == set(found)
    cases = rows(run / "cases.csv")
    at_target = [row["split"] for row in cases if row["site"] == "Harbour Hospital"]
    assert set(at_target) == {"target", "test"}
    assert "target" not in {row["split"] for row in cases if row["site"] != "Harbour Hospital"}
    predicted = {row["case_id"] for row in rows(run / "predictions.csv")}
    assert predicted == {row["case_id"] for row in cases if row["split"] == "test"}
    (line,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert 0 <= line["domain_accuracy"] <= 1
    assert "parameters learn" in capfd.readouterr().err


def test_adaptation_without_a_target_ends_with_2(train_tiny, tmp_path, capsys):
    assert train_tiny(tmp_path / "run", "objective.name=dann") == 2
    assert "data.target_sites" in capsys.readouterr().err


def test_unlabelled_scans_of_the_target_take_part_without_a_row(site, tmp_path, capfd):
    """Nobody writes rows for scans that nobody labelled."""
    labels = tmp_path / "labels.csv"
    with site.labels.open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    with labels.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, table[0].keys())
        writer.writeheader()
        writer.writerows(row for row in table if row["site"] != "Harbour Hospital")
    arguments = [str(site.folder), "--labels", str(labels), "--output", str(tmp_path / "run"), *TINY]
    assert train.main([*arguments, *TOWARDS_HARBOUR, "objective.name=mmd"]) == 3
    assert "unlabelled cases of target sites" in capfd.readouterr().err
    found = json.loads((tmp_path / "run" / "adaptation.json").read_text())
    assert found["target"] is None
    assert found["domain_probe"] is not None
    splits = {row["split"] for row in rows(tmp_path / "run" / "cases.csv") if row["site"] == "Harbour Hospital"}
    assert splits == {"target"}


def test_a_sweep_goes_on_with_the_best_point_and_says_so(train_tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("medvit.training.grid.GRIDS", {"strength": {"objective.strength": (0.0, 1.0)}})
    informative = iter((0.0, 5.0) * 2)
    monkeypatch.setattr("medvit.training.grid.information", lambda _: next(informative))
    run = tmp_path / "run"
    assert train_tiny(run, *TOWARDS_HARBOUR, "objective.name=dann", "--sweep", "strength") == 3
    points = rows(run / "sweep.csv")
    assert [point["objective.strength"] for point in points] == ["1.0", "0.0"]  # as configured, then the others
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["strength"] == 0
    shown = capfd.readouterr().err
    assert "strength 1: validation AUROC" in shown
    assert "goes on with strength 0: training without adaptation" in shown
    assert train_tiny(run, *TOWARDS_HARBOUR, "objective.name=dann", "--sweep", "strength", "--resume") == 3
    assert rows(run / "sweep.csv") == points


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "rates", "data.folds=3"], "each of them is judged in another fold"),
        (["--sweep", "strength"], "has none. Take dann"),
    ],
)
def test_a_sweep_that_compares_nothing_or_by_what_judges_is_refused(words, message, train_tiny, tmp_path, capsys):
    assert train_tiny(tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def rewritten(site, path, change) -> list[str]:
    """Arguments of the hospital with a changed table of labels."""
    table = [change(row) for row in rows(site.labels)]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    return [str(site.folder), "--labels", str(path), *TINY]


def test_one_source_and_one_target_can_be_tried_dry(site, tmp_path, capfd):
    """The domains of a step are those of source and target."""
    two = rewritten(
        site,
        tmp_path / "labels.csv",
        lambda row: {**row, "site": "Here" if row["site"] != "Harbour Hospital" else "There"},
    )
    words = [*TOWARDS_HARBOUR[1:], "data.target_sites=[There]", "objective.name=dann"]
    assert train.main([*two, *words, "--dry-run", f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    assert "one step takes" in capfd.readouterr().err


def test_a_second_label_column_is_not_what_is_judged(site, tmp_path, capfd):
    """It was predictions.csv's: the report judged the wrong label, and nobody was told."""

    def with_a_second(row):
        return {**row, "finding": row["label"], "label": str(1 - int(row["label"])), "p_stage": "7"}

    arguments = rewritten(site, tmp_path / "labels.csv", with_a_second)
    run = tmp_path / "run"
    assert train.main([*arguments, "--label-column", "finding", "--output", str(run)]) == 3
    told = {row["case_id"]: row["label"] for row in rows(run / "cases.csv")}
    predicted = rows(run / "predictions.csv")
    assert all(row["label"] == told[row["case_id"]] for row in predicted)
    assert all(row["table_label"] == str(1 - int(row["label"])) for row in predicted)
    assert "column label is called table_label" in capfd.readouterr().err


def test_patients_who_taught_the_weights_do_not_judge(trained, train_tiny, tmp_path, capsys):
    taught = [f"model.weights={trained}", "training.stages.0.epochs=1"]
    assert train_tiny(tmp_path / "one", *taught, "data.folds=3") == 4
    assert "LEAKAGE" in capsys.readouterr().err
    file = f"model.weights={trained / 'bundle' / 'model.safetensors'}"
    assert train_tiny(tmp_path / "three", *taught, file, "data.folds=3") == 4
    assert train_tiny(tmp_path / "two", *taught, "preprocessing.mean=[0.5,0.5,0.5]", "--dry-run") != 4  # the same split


def test_weights_of_unknown_patients_are_told(trained, train_tiny, tmp_path, capfd):
    shutil.copytree(trained / "bundle", tmp_path / "elsewhere")
    assert train_tiny(tmp_path / "run", f"model.weights={tmp_path / 'elsewhere'}", "--dry-run") != 4
    assert "has learned from these patients is not known: no cases.csv" in capfd.readouterr().err


def test_under_another_site_key_who_taught_the_weights_is_told_to_be_unknown(
    trained, train_tiny, tmp_path, monkeypatch, capfd
):
    """All hashes differ: that nobody is found among them says nothing."""
    monkeypatch.setenv("MEDVIT_SITE_KEY", "another")
    assert train_tiny(tmp_path / "run", f"model.weights={trained}", "data.folds=3", "--dry-run") != 4
    assert "is not known: it was made under another site key" in capfd.readouterr().err


def test_two_processes_train_the_model_of_one(site, tmp_path):
    """The same cases in each step, nothing random in the model: what differs is rounding."""
    common = [str(site.folder), "--labels", str(site.labels), *TINY, "model.drop_path=0", "training.threads=1"]
    assert train.main([*common, "--output", str(tmp_path / "one"), "training.batch_size=4"]) == 3
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "medvit.cli.train", *common, "--output", str(tmp_path / "two"), "training.batch_size=2"]
    done = subprocess.run([*command, *program], capture_output=True, text=True, timeout=300, check=False)
    assert "Error" not in done.stderr.replace("ChildFailedError", ""), done.stderr[-2000:]
    predictions = [rows(tmp_path / name / "predictions.csv") for name in ("one", "two")]
    assert [row["case_id"] for row in predictions[0]] == [row["case_id"] for row in predictions[1]]
    for one, two in zip(*predictions, strict=True):
        assert float(one["p_1"]) == pytest.approx(float(two["p_1"]), abs=2e-3)
    assert (tmp_path / "two" / "report" / "report.html").is_file()
