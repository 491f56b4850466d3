import json

import pytest

from medvit import cli
from medvit.cli import demo, doctor
from medvit.cli.console import command
from medvit.config import load_config, shipped_configs


def test_every_command_teaches(capsys):
    for name in cli.COMMANDS:
        assert cli.main([name, "-h"]) == 0
        assert "exit codes" in capsys.readouterr().out


def test_unknown_command_ends_with_2():
    assert cli.main(["frobnicate"]) == 2


def test_unexpected_errors_show_their_kind_and_not_their_text(capsys):
    @command
    def broken(argv):
        raise RuntimeError("DOE^JOHN")

    assert broken(None) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError" in shown
    assert "DOE" not in shown


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_load_and_say_how_to_run(name):
    load_config(name)
    text = shipped_configs()[name].read_text()
    assert text.startswith("#")
    assert "medvit-" in text


def test_doctor_lists_codecs_and_configs(capsys):
    assert doctor.main(["--json"]) == 0
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["decode JPEG-LS"]["works"]
    assert "frozen" in found["shipped configs"]["detail"]


def test_demo_sets_aside_exactly_what_it_planted(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "PATIENTS", 24)
    monkeypatch.setattr(demo, "EXPORTED", 4)
    overrides = ["training.stages.0.epochs=1", "evaluation.bootstrap=100", "evaluation.robustness=null"]
    assert demo.main(["--output", str(tmp_path / "demo"), *overrides]) == 0
    for name in ("hospital", "labels.csv", "run", "report/report.html", "export", "results/predictions.csv"):
        assert (tmp_path / "demo" / name).exists()
    assert "DIFFERENT" not in capfd.readouterr().out
