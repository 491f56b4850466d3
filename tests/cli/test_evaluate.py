import csv
import json
import random
import re
import shutil

import pytest

from medvit.cli import evaluate
from medvit.cli.learned import KNOWN, learned_from


@pytest.fixture
def unfair(tmp_path):
    """Predictions that serve one site worse, from 400 patients."""
    rng = random.Random(1)
    path = tmp_path / "predictions.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("case_id", "patient_id", "label", "p_0", "p_1", "site", "sex", "threshold"))
        for number in range(400):
            label, site = number % 2, "AB"[number // 2 % 2]
            right = rng.random() < (0.95 if site == "A" else 0.6)
            score = 0.8 if (label == 1) == right else 0.2
            writer.writerow((f"c{number}", f"p{number}", label, 1 - score, score, site, "FM"[number // 4 % 2], 0.5))
    return path


@pytest.mark.parametrize("given", ["", "bundle"])
def test_report_of_a_run_or_of_the_bundle_in_it(trained, given, tmp_path, capsys):
    assert evaluate.main([str(trained / given), "--output", str(tmp_path / "report")]) == 0
    told = capsys.readouterr().out
    assert "AUROC" in told
    assert "latency" in told
    reports = trained / "report", tmp_path / "report"
    own, again = (json.loads((report / "metrics.json").read_text()) for report in reports)
    assert own == again
    pages = ((report / "report.html").read_text(encoding="utf-8") for report in reports)
    own, again = (re.findall(r"<h1>.*</h1>|<dt>.*</dd>", page) for page in pages)
    assert own == again
    assert "Positive class" in str(again)  # how the run was made


def test_a_run_that_is_called_bundle_is_a_run(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "bundle")
    assert evaluate.main([str(run), "--output", str(tmp_path / "report")]) == 0
    assert learned_from(run, KNOWN) == learned_from(trained, KNOWN)
    assert learned_from(run, KNOWN).names


def test_a_bundle_alone_on_another_labelled_folder(trained, export, tmp_path):
    model = shutil.copytree(trained / "bundle", tmp_path / "model")
    arguments = [str(model), str(export.folder), "--labels", str(export.labels), "--output", str(tmp_path / "report")]
    assert evaluate.main(arguments) == 3
    assert (tmp_path / "report" / "predictions.csv").is_file()
    assert not list((tmp_path / "report").glob(".cache-*"))
    numbers = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert numbers["latency"]["cases"] == 4
    assert {"explanation", "robustness"} <= set(numbers)
    assert numbers["robustness"]["available"] == 4
    assert any("learned from these patients is not known: no cases.csv" in note for note in numbers["notes"])
    assert any("default settings (tolerance 0.1)" in note for note in numbers["notes"])


@pytest.fixture
def strict(trained, tmp_path):
    """The run with a tolerance and draws of its own."""
    run = shutil.copytree(trained, tmp_path / "strict")
    text = (run / "config.yaml").read_text(encoding="utf-8").replace("bootstrap: 100", "bootstrap: 120")
    (run / "config.yaml").write_text(text.replace("tolerance: 0.1", "tolerance: 0.01"), encoding="utf-8")
    return run


@pytest.mark.parametrize("given", ["", "bundle"])
def test_a_bundle_in_a_run_is_evaluated_by_the_settings_of_the_run(strict, export, given, tmp_path):
    report = tmp_path / "report"
    arguments = [str(export.folder), "--labels", str(export.labels), "--output", str(report)]
    assert evaluate.main([str(strict / given), *arguments]) == 3
    numbers, fairness = (json.loads((report / f"{name}.json").read_text()) for name in ("metrics", "fairness"))
    assert (numbers["draws"], fairness["tolerance"]) == (120, 0.01)
    assert not any("default settings" in note for note in numbers["notes"])


def test_a_bundle_alone_has_no_predictions_to_judge(trained, tmp_path, capsys):
    model = shutil.copytree(trained / "bundle", tmp_path / "model")
    assert evaluate.main([str(model), "--output", str(tmp_path / "report")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "a bundle alone has none" in told
    assert "FOLDER of CT with --labels" in told


def test_patients_whom_the_model_has_learned_from_do_not_judge_it(trained, site, tmp_path, capsys):
    report = tmp_path / "report"
    arguments = [str(trained), str(site.folder), "--labels", str(site.labels), "--output"]
    assert evaluate.main([*arguments, str(report)]) == 3
    told = capsys.readouterr()
    assert "rows of the table mean scans that were set aside" in told.err
    with (trained / "cases.csv").open(encoding="utf-8-sig", newline="") as stream:
        sides = {row["case_id"]: row["split"] for row in csv.DictReader(stream)}
    with (report / "predictions.csv").open(encoding="utf-8-sig", newline="") as stream:
        judged = {row["case_id"] for row in csv.DictReader(stream)}
    assert judged == {case for case, side in sides.items() if side == "test"}
    notes = json.loads((report / "metrics.json").read_text(encoding="utf-8"))["notes"]
    assert any("whom the model has learned from: left out" in note for note in notes)
    assert any("mean scans that were set aside" in note for note in notes)
    (tmp_path / "run").mkdir()
    shutil.copytree(trained / "bundle", tmp_path / "run" / "bundle")
    text = (trained / "cases.csv").read_text(encoding="utf-8-sig").replace("test", "train")
    (tmp_path / "run" / "cases.csv").write_text(text, encoding="utf-8")
    shutil.copy(trained / "identities.csv", tmp_path / "run")
    assert evaluate.main([str(tmp_path / "run"), *arguments[1:], str(tmp_path / "other")]) == 4
    assert "has learned from all" in capsys.readouterr().err


def test_what_would_be_ignored_or_overwritten_is_refused(trained, site, unfair, tmp_path, capsys):
    for first in ([str(trained)], ["--predictions", str(unfair)]):
        assert evaluate.main([*first, "--labels", str(site.labels), "--output", str(tmp_path / "report")]) == 2
        assert "--labels: belongs to a FOLDER" in capsys.readouterr().err
    before = (trained / "predictions.csv").read_bytes()
    assert evaluate.main([str(trained), str(site.folder), "--labels", str(site.labels), "--output", str(trained)]) == 2
    assert "results of a run" in capsys.readouterr().err
    assert (trained / "predictions.csv").read_bytes() == before
    (tmp_path / "file").write_text("")
    assert evaluate.main(["--predictions", str(unfair), "--output", str(tmp_path / "file" / "report")]) == 2
    assert "no folder can be made there" in capsys.readouterr().err


def test_pictures_of_patients_can_be_left_out(train_tiny, tmp_path):
    assert train_tiny(tmp_path / "run", "evaluation.attention=null", "training.stages.0.epochs=1") == 3
    assert "data:image" not in (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")


def test_gain_over_the_present_method_is_named(trained, unfair, tmp_path, capsys):
    arguments = ["--predictions", str(unfair), "--output", str(tmp_path / "report")]
    assert evaluate.main([*arguments, "--baseline", f"readers={unfair}"]) == 0
    gain = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))["gain"]
    assert (gain["baseline"], gain["cases"], gain["auroc"]["point"]) == ("readers", 400, 0.0)
    assert "AUROC over readers" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert evaluate.main([*arguments, "--baseline", str(unfair)]) == 2
    assert "NAME=CSV" in capsys.readouterr().err
    run = [str(trained), "--output", str(tmp_path / "other"), "--baseline", f"readers={unfair}"]
    assert evaluate.main(run) == 2
    assert "no case_id" in capsys.readouterr().err


def test_what_the_comparison_with_a_baseline_leaves_out_is_among_the_notes(unfair, tmp_path):
    few, report = tmp_path / "few.csv", tmp_path / "report"
    lines = unfair.read_text().splitlines()[:201]
    few.write_text("\n".join(line.rpartition(",")[0] for line in lines))  # half of the cases, and no threshold
    arguments = ["--predictions", str(unfair), "--baseline", f"readers={few}", "--output", str(report)]
    assert evaluate.main(arguments) == 0
    notes = json.loads((report / "metrics.json").read_text(encoding="utf-8"))["notes"]
    assert [note for note in notes if "Left out are 200 of the model's 400 and 0 of the baseline's 200" in note]
    assert [note for note in notes if "Baseline readers: No threshold was given" in note]
    assert "Baseline readers: No threshold" in (report / "report.html").read_text(encoding="utf-8")


def test_gate_refuses_what_serves_a_site_worse(unfair, tmp_path):
    arguments = ["--predictions", str(unfair), "--output", str(tmp_path / "report")]
    assert evaluate.main(arguments) == 0
    assert evaluate.main([*arguments, "--gate"]) == 4


@pytest.mark.parametrize("arguments", [[], ["run", "--predictions", "x.csv"], ["--predictions", "nowhere.csv"]])
def test_wrong_usage_ends_with_2(arguments, tmp_path):
    assert evaluate.main([*arguments, "--output", str(tmp_path)]) == 2


def test_cases_that_the_model_refuses_are_counted_by_group(site, for_one_vendor, tmp_path):
    report = tmp_path / "report"
    arguments = [str(for_one_vendor), str(site.folder), "--labels", str(site.labels), "--output", str(report)]
    assert evaluate.main(arguments) == 3
    with (report / "predictions.csv").open(encoding="utf-8-sig", newline="") as stream:
        written = list(csv.DictReader(stream))
    refused = [row for row in written if row["flags"] == "NOT_FOR_MODEL"]
    assert len(written) == site.patients
    assert {row["site"] for row in refused} == {"North Clinic", "Harbour Hospital"}
    assert not any(row["p_0"] or row["predicted"] for row in refused)
    tables = json.loads((report / "fairness.json").read_text(encoding="utf-8"))["tables"]
    by_site = {group["name"]: (group["cases"], group["refused"]) for group in tables[0]["groups"]}
    assert by_site == {"Harbour Hospital": (0, 8), "Hill University": (8, 0), "North Clinic": (0, 8)}
