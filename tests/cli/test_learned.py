"""Who has taught a model is known again under another id, from an earlier run, and under the same key only."""

import csv
from dataclasses import replace

import pytest

from medvit.cli.learned import KNOWN, MET, TAUGHT, Shared, shared, write_identities
from medvit.config import load_config
from medvit.records import Case


def case_of(number, **changes):
    one = Case(case_id=f"c{number}", patient_id=f"p{number}", group=f"p{number}", root="", files=(str(number),))
    return replace(one, **{"identities": (f"id:{number}", f"name:{number}")} | changes)


CASES = [case_of(number) for number in range(12)]
SIDES = ["train"] * 6 + ["val"] * 3 + ["test"] * 3


def run_of(folder, cases=CASES, sides=SIDES, folds=(0,), weights="none", config=None):
    """What medvit-train leaves behind of who was where."""
    folder.mkdir()
    with (folder / "cases.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("case_id", "patient_id", "split", "fold"))
        writer.writerows(
            (c.case_id, c.patient_id, s, folds[i % len(folds)])
            for i, (c, s) in enumerate(zip(cases, sides, strict=True))
        )
    write_identities(folder, cases)
    (folder / "config.yaml").write_text(load_config(config, [f"model.weights={weights}"]).to_yaml())
    return folder


def test_sides_decide_and_folds_teach_all(tmp_path):
    run = run_of(tmp_path / "run")
    assert shared(run, CASES, TAUGHT) == Shared(frozenset(f"p{n}" for n in range(6)))
    assert shared(run, CASES, KNOWN).patients == {f"p{n}" for n in range(9)}
    assert shared(run_of(tmp_path / "folds", folds=(0, 1, 2)), CASES, TAUGHT).patients == {c.patient_id for c in CASES}


@pytest.mark.parametrize(
    "again",
    [
        case_of(0, patient_id="other", identities=("id:x", "name:0")),  # another id, the same name and birth date
        case_of(0, case_id="other", patient_id="other", identities=("id:0",)),  # written otherwise
        case_of(0, patient_id="other", identities=()),  # the very scan
        case_of(0, case_id="other"),  # a later scan
    ],
)
def test_a_person_is_known_again(again, tmp_path):
    assert shared(run_of(tmp_path / "run"), [again], TAUGHT).patients == {again.patient_id}
    stranger = case_of(99)
    assert not shared(run_of(tmp_path / "other"), [stranger], TAUGHT).patients


def test_what_everybody_has_names_nobody(tmp_path):
    common = [replace(case, identities=(*case.identities, "frame:all")) for case in CASES]
    run = run_of(tmp_path / "run", common)
    assert not shared(run, [case_of(99, identities=("frame:all",))], TAUGHT).patients


def test_who_taught_an_earlier_run_taught_this_one(tmp_path):
    first = run_of(tmp_path / "first", CASES[:6], SIDES[:6])
    second = run_of(tmp_path / "second", CASES[6:], ["train"] * 6, weights=first)
    third = run_of(tmp_path / "third", [], [], weights=second)
    assert len(shared(third, CASES, TAUGHT).patients) == 12
    first.rename(tmp_path / "moved")
    found = shared(third, CASES, TAUGHT)
    assert len(found.patients) == 6
    assert "gone" in found.unknown


def test_pretraining_teaches_nobody_s_label_but_what_came_before_it_may(tmp_path):
    """Pretrained on the whole folder, trained, and trained on from there: who judges each time stays the same."""
    backbone = run_of(tmp_path / "backbone", sides=["train"] * 12, config="pretrain_simclr")
    second = run_of(tmp_path / "second", weights=backbone)
    assert shared(backbone, CASES, TAUGHT) == Shared(frozenset())
    assert shared(second, CASES, TAUGHT).patients == {f"p{n}" for n in range(6)}
    assert len(shared(second, CASES, MET).patients) == 12
    first = run_of(tmp_path / "first")
    between = run_of(tmp_path / "between", [], [], weights=first, config="pretrain_simclr")
    assert len(shared(run_of(tmp_path / "last", [], [], weights=between), CASES, TAUGHT).patients) == 6


def test_what_cannot_be_told_is_said(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run")
    monkeypatch.setenv("MEDVIT_SITE_KEY", "another")
    assert "another site key" in shared(run, CASES, KNOWN).unknown
    (run / "identities.csv").unlink()
    assert "no cases.csv with identities.csv" in shared(run, CASES, KNOWN).unknown
