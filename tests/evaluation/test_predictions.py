import numpy as np
import pandas as pd
import pytest

from medvit.evaluation.predictions import (
    check_predictions,
    class_names,
    one_vs_rest,
    read_predictions,
)
from medvit.evaluation.predictions_csv import write_predictions
from medvit.records import Prediction, UsageError

GOOD = "case_id,patient_id,label,p_0,p_1,site\nc1,x,0,0.9,0.1,A\nc2,x,1,0.2,0.8,B\nc3,y,1,0.6,0.4,B\n"


def read(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "predictions.csv"
    path.write_bytes(text.encode(encoding))
    return read_predictions(path)


def test_identifiers_and_classes_stay_text(tmp_path):
    frame = read(tmp_path, GOOD.replace("c1", "007"))
    assert class_names(frame) == ("0", "1")
    assert frame["case_id"][0] == "007"
    assert list(frame["label"]) == ["0", "1", "1"]
    assert list(frame["predicted"]) == ["0", "1", "0"]
    assert any("No threshold" in note for note in frame.attrs["notes"])


def test_positive_class_is_the_last_column(tmp_path):
    view = one_vs_rest(read(tmp_path, GOOD))
    assert view.names == ("1",)
    assert view.truth[:, 0].tolist() == [False, True, True]
    assert view.called[:, 0].tolist() == [False, True, False]
    assert view.score[:, 0].tolist() == [0.1, 0.8, 0.4]


def test_class_called_na_and_byte_order_mark(tmp_path):
    frame = read(tmp_path, "label,p_NA,p_None\nNA,0.9,0.1\nNone,0.2,0.8\n", "utf-8-sig")
    assert list(frame["label"]) == ["NA", "None"]


def test_threshold_decides_unless_predicted_is_given(tmp_path):
    frame = read(tmp_path, "label,p_0,p_1,threshold\n0,0.9,0.1,0.3\n1,0.6,0.4,0.3\n")
    assert list(frame["predicted"]) == ["0", "1"]
    frame = read(tmp_path, "label,p_0,p_1,threshold,predicted\n0,0.9,0.1,0.3,0\n1,0.6,0.4,0.3,0\n")
    assert list(frame["predicted"]) == ["0", "0"]
    assert any("1 cases" in note and "contradicts" in note for note in frame.attrs["notes"])


def test_predicted_never_depends_on_labels(cohort):
    frame = cohort()
    shuffled = frame.assign(label=frame["label"].sample(frac=1, random_state=0).to_numpy())
    assert (check_predictions(frame)["predicted"] == check_predictions(shuffled)["predicted"]).all()


def test_unlabelled_rows_are_set_aside_and_counted(tmp_path):
    frame = read(tmp_path, GOOD + "c4,z,,,,A\n")
    assert len(frame) == 3
    assert "1 of 4 rows have no label and were set aside." in frame.attrs["notes"]


def test_without_patients_each_case_is_one_and_the_report_says_so(tmp_path):
    frame = read(tmp_path, "label,p_0,p_1\n0,0.9,0.1\n1,0.2,0.8\n")
    assert frame["patient_id"].nunique() == frame["case_id"].nunique() == 2
    assert any("no patient_id" in note and "too narrow" in note for note in frame.attrs["notes"])


def test_single_probability_is_complemented(tmp_path):
    frame = read(tmp_path, "label,p_1\n0,0.1\n1.0,0.8\n")
    assert class_names(frame) == ("0", "1")
    assert frame["p_0"].tolist() == pytest.approx([0.9, 0.2])
    assert list(frame["label"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("text", "seen", "needed"),
    [
        ("", "not readable", "UTF-8"),
        ("case_id,p_0,p_1\nc1,0.5,0.5\n", "saw case_id, p_0, p_1", "column `label`"),
        ("label,score\n0,0.5\n", "saw label, score", "`p_<class>`"),
        ("label;p_0;p_1\n0;0.5;0.5\n", "saw label;p_0;p_1", "Use commas"),
        (GOOD.replace("c1,x,0", "c1,x,healthy"), "'healthy'", "'0', '1'"),
        (GOOD.replace("0.9,0.1", "1.9,-0.9"), "data row 1", "sum 1"),
        (GOOD.replace("0.2,0.8", "0.2,0.2"), "data row 2", "sum 1"),
        (GOOD.replace("0.2,0.8", "0.2,high"), "data row 2", "softmax"),
        (GOOD.replace("0.2,0.8", "0.2,"), "data row 2", "softmax"),
        (GOOD.replace("c2", "c1"), "data row 2", "one row"),
        ("label,p_0,p_1\n,0.5,0.5\n", "none of 1 rows", "Fill `label`"),
        ("label,p_0,p_1\n", "none of 0 rows", "Fill `label`"),
        ("label,p_0,p_1,predicted\n0,0.5,0.5,maybe\n", "`predicted` has 'maybe'", "same text"),
        ("p_1,label,predicted\n0.7,1,0,1\n0.6,1,0,\n", "1 rows have more cells", "first data row 1"),
        ("label,p_0,p_1,label \n0,0.5,0.5,1\n", "label are there twice", "Keep one"),
        ('label,p_0,p_1,threshold\n0,0.5,0.5,"0,9"\n', "'0,9', which is no number", "decimal point"),
    ],
)
def test_errors_say_what_was_seen_and_what_is_needed(tmp_path, text, seen, needed):
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert seen in str(error.value)
    assert needed in str(error.value)


def test_a_comma_at_the_end_of_rows_moves_no_column(tmp_path):
    frame = read(tmp_path, "p_1,label,predicted\n0.7,1,0,\n0.2,0,0,\n")
    assert frame["p_1"].tolist() == [0.7, 0.2]
    assert frame["label"].tolist() == ["1", "0"]


def test_columns_without_a_name_are_left_out(tmp_path):
    frame = read(tmp_path, ",label,p_0,p_1,,\n0,0,0.5,0.5,x,\n1,1,0.5,0.5,,\n")
    assert "" not in frame.columns
    assert any("3 columns have no name" in note for note in frame.attrs["notes"])


def test_semicolons_with_decimal_commas_are_seen_as_such(tmp_path):
    with pytest.raises(UsageError, match="Use commas"):
        read(tmp_path, "label;p_0;p_1\n0;0,9;0,1\n")


@pytest.mark.parametrize("nothing", ["NA", "-", "None", ""])
def test_a_threshold_that_is_not_given_may_be_written_in_many_ways(tmp_path, nothing):
    assert read(tmp_path, f"label,p_0,p_1,threshold\n0,0.5,0.5,{nothing}\n")["threshold"].isna().all()


def test_ages_that_are_no_numbers_are_counted(tmp_path):
    frame = read(tmp_path, "label,p_0,p_1,age\n0,0.5,0.5,045Y\n1,0.5,0.5,45\n1,0.5,0.5,\n")
    assert frame["age"].isna().tolist() == [True, False, True]
    assert "1 cells of `age` are no numbers and count as not given." in frame.attrs["notes"]


def test_rows_without_a_case_id_are_numbered_and_told_apart(tmp_path):
    frame = read(tmp_path, "case_id,label,p_0,p_1\n,0,0.5,0.5\na,1,0.5,0.5\n,1,0.5,0.5\n")
    assert frame["case_id"].is_unique
    assert any("2 of 3 rows have no case_id" in note for note in frame.attrs["notes"])


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="FileNotFoundError"):
        read_predictions(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match="UTF-8"):
        read(tmp_path, GOOD.replace("A", "Zürich"), "latin-1")


def test_errors_do_not_name_cases_or_patients(tmp_path):
    with pytest.raises(UsageError) as error:
        read(tmp_path, GOOD.replace("c2", "Mueller^Anna").replace("c3", "Mueller^Anna"))
    assert "Mueller" not in str(error.value)


def make_prediction(**changes):
    values = {"case_id": "c1", "patient_id": "x", "probabilities": {"0": 0.25, "1": 0.75}, "label": "1"} | changes
    return Prediction(**values)


def test_written_predictions_are_read_back(tmp_path):
    path = tmp_path / "deep" / "predictions.csv"
    write_predictions([make_prediction(fold=0, site="Süd"), make_prediction(case_id="c2", age=63.0)], path)
    header = path.read_text(encoding="utf-8-sig").splitlines()[0]
    assert header == "case_id,patient_id,label,p_0,p_1,predicted,site,sex,age,fold"
    frame = read_predictions(path)
    assert list(frame["site"]) == ["Süd", ""]
    assert list(frame["fold"]) == ["0", ""]
    assert np.isnan(frame["age"][0])
    assert list(path.parent.iterdir()) == [path]


def test_attributes_follow_the_contract_columns(tmp_path):
    path = tmp_path / "predictions.csv"
    frame = pd.DataFrame([make_prediction(threshold=0.4, attributes={"kernel": "B30f"}).to_row()])
    write_predictions(frame[sorted(frame.columns)], path)
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header == "case_id,patient_id,label,p_0,p_1,predicted,site,sex,age,threshold,kernel"


def test_formulas_are_neutralised_and_restored(tmp_path):
    path = tmp_path / "predictions.csv"
    evil = "=HYPERLINK(1)"
    write_predictions([make_prediction(site=evil, label="-1", probabilities={"0": 0.25, "-1": 0.75})], path)
    text = path.read_text(encoding="utf-8")
    assert f"'{evil}" in text
    assert ",0.75," in text
    frame = read_predictions(path)
    assert frame["site"][0] == evil
    assert frame["label"][0] == "-1"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "predictions.csv"
    write_predictions([make_prediction()], path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_predictions([make_prediction(case_id="other")], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_cases_that_the_model_refused_are_kept_apart(tmp_path):
    text = "case_id,label,p_0,p_1,site,flags\nc1,0,0.9,0.1,A,LOSSY\nc2,1,,,B,LOSSY NOT_FOR_MODEL\nc3,1,0.6,0.4,B,\n"
    frame = read(tmp_path, text)
    assert frame["case_id"].tolist() == ["c1", "c3"]
    assert [(row["case_id"], row["site"]) for row in frame.attrs["refused"]] == [("c2", "B")]
    assert any("1 of 3 cases were refused" in note for note in frame.attrs["notes"])


def test_a_case_without_probabilities_that_nobody_refused_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="not probabilities"):
        read(tmp_path, "label,p_0,p_1,flags\n0,0.9,0.1,\n1,,,LOSSY\n")


def test_nothing_but_refused_cases_cannot_be_judged(tmp_path):
    with pytest.raises(UsageError, match="refused all 1"):
        read(tmp_path, "label,p_0,p_1,flags\n1,,,NOT_FOR_MODEL\n")
