import dataclasses
import json
import re

import pytest

from medvit.config import EvaluationConfig, ModelConfig
from medvit.evaluation.model_card import OUT_OF_SCOPE, TO_FILL, read_made, write_model_card
from medvit.evaluation.report import write_report
from medvit.models.bundle_info import BundleInfo, TrainingRange
from medvit.records import Case, Preprocessing, UsageError

INFO = BundleInfo(
    architecture=ModelConfig(weights="none"),
    preprocessing=Preprocessing(windows=("brain", (60.0, 60.0)), size=126),
    mean=(0.5,) * 2,
    std=(0.5,) * 2,
    classes=("none", "bleed"),
    threshold=0.41,
    training_range=TrainingRange(body_parts=("HEAD",), slice_thickness_mm=(1.0, 5.0)),
    refuse=("body_part",),
    weights_sha256="ab" * 32,
)


def cases() -> list[Case]:
    return [
        Case(
            case_id=f"case{k}",
            patient_id=f"Mueller{k // 2}",
            group="",
            root="",
            files=("",),
            label=["none", "bleed", None][k % 3],
            site="North|East" if k % 2 else "",
            sex="FM"[k % 2],
            age=[None, 40, 70][k % 3],
        )
        for k in range(12)
    ]


@pytest.fixture(scope="module")
def written(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    frame = cohort(200)
    frame.loc[frame["site"] == "North", "label"] = "bleed"  # the site tells the label
    report = write_report(frame, folder, EvaluationConfig(bootstrap=100))
    card = write_model_card(folder, INFO, cases(), report, {"Split": "patients held out"})
    return report, card, (folder / "model_card.md").read_text(), json.loads((folder / "model_card.json").read_text())


def test_both_forms_say_the_same(written):
    report, card, text, document = written
    assert document == json.loads(json.dumps(card))
    assert document["evaluation"]["figures"]["auroc"]["point"] == report.auroc.point
    assert f"{report.auroc.point:.2f} [{report.auroc.low:.2f}, {report.auroc.high:.2f}]" in text


def test_how_the_model_was_made_is_read_from_the_card_that_people_fill_in(written, tmp_path):
    assert read_made(tmp_path) == {}
    filled = json.dumps(written[3] | {"intended_use": "Sorting a list, at night"})
    (tmp_path / "model_card.json").write_text(filled)
    assert read_made(tmp_path) == {"Split": "patients held out"}
    (tmp_path / "model_card.json").write_text(filled.replace(",", ";", 1))
    with pytest.raises(UsageError, match="Mend what was filled in, or delete it"):
        read_made(tmp_path)


def test_what_the_model_refuses_is_said_with_its_limits(written):
    text = written[2]
    assert "- Refuses scans whose header gives what no training scan had: body part; spelt otherwise is another" in text
    assert "what headers do not give refuses nothing\n- Unlike the training cases" in text


def test_what_only_a_person_can_say_is_left_open_and_marked(written):
    _, _, text, document = written
    assert text.count("FILL IN (") == len(TO_FILL)
    assert all(document[field] is None for field in TO_FILL)


def test_uses_that_are_never_intended_are_named(written):
    text = written[2]
    assert all(use in text for use in OUT_OF_SCOPE)
    for part in ("hard real time", "explanation", "identifying persons", "other modalities"):
        assert part in text


def test_who_is_in_the_data_is_counted_and_not_named(written):
    _, _, text, document = written
    data = document["data"]
    assert (data["cases"], data["patients"]) == (12, 6)
    assert data["labels"] == {"bleed": 4, "no label": 4, "none": 4}
    assert data["sites"] == {"North|East": 6, "not given": 6}
    assert data["age_years"] == {"youngest": 40, "oldest": 70}
    assert data["age_not_given"] == 4
    assert not re.search("Mueller|case[0-9]", text + json.dumps(document))


def test_it_warns_of_what_its_own_figures_say(written):
    _, _, text, document = written
    assert any("confounding" in warning for warning in document["warnings"])
    assert "confounding" in text


def test_the_training_range_and_the_operating_point_are_told(written):
    text = written[2]
    for part in ("1.0 to 5.0", "HEAD", "0.41 or more", "brain, 60.0/60.0", "body part"):
        assert part in text


def test_without_folds_no_models_of_folds_are_named(cohort, tmp_path, written):
    report = write_report(cohort(60).drop(columns="fold"), tmp_path, EvaluationConfig(bootstrap=100))
    write_model_card(tmp_path, INFO, cases(), report, {})
    assert "60 held-out cases of" in (tmp_path / "model_card.md").read_text()
    assert "200 held-out cases, judged by the models of their folds, of" in written[2]


def test_tables_are_markdown(written):
    lines = written[2].splitlines()
    for before, rule, row in zip(lines, lines[1:], lines[2:], strict=False):
        if re.fullmatch(r"\|(---\|)+", rule):
            assert before.count("|") == rule.count("|") == row.count("|")
    assert not re.search(r"[{}]|\n\n\n\n", written[2])


def test_what_is_undefined_is_a_warning_and_old_age_is_not_exact(cohort, tmp_path):
    report = write_report(cohort(60).assign(label="none"), tmp_path, EvaluationConfig(bootstrap=100))
    old = [dataclasses.replace(case, age=101) for case in cases()]
    card = write_model_card(tmp_path, INFO, old, report, {})
    assert any("undefined" in warning for warning in card["warnings"])
    assert card["data"]["age_years"]["oldest"] == 90
    assert "90 or more years" in (tmp_path / "model_card.md").read_text()
    assert "101" not in (tmp_path / "model_card.md").read_text()
