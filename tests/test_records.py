"""Records are valid once built, and every code says what it does and what to do about it."""

import pickle

import numpy as np
import pytest
from pydantic import ValidationError

from medvit.records import (
    PREDICTION_COLUMNS,
    REASONS,
    WINDOWS,
    Outcome,
    Prediction,
    Preprocessing,
    ReasonCode,
    Scan,
    ScanError,
    ScanHeader,
    resolve_window,
)

HU = np.zeros((2, 3, 4), np.float32)


@pytest.mark.parametrize("code", ReasonCode)
def test_each_code_has_an_outcome_and_a_remedy(code):
    assert REASONS[code].outcome in Outcome
    assert len(REASONS[code].remedy) > 10
    assert str(ScanError(code, "seen")).startswith(f"{code}: seen. ")


def test_scan_error_survives_a_process_border():
    again = pickle.loads(pickle.dumps(ScanError(ReasonCode.GANTRY_TILT, "sheared", ("a", "b"))))
    assert (again.code, again.detail, again.files) == (ReasonCode.GANTRY_TILT, "sheared", ("a", "b"))


@pytest.mark.parametrize(
    ("hu", "affine"),
    [
        (HU.astype(np.float64), np.eye(4)),
        (HU[0], np.eye(4)),
        (HU[:0], np.eye(4)),
        (HU, np.eye(3)),
        (HU, np.full((4, 4), np.nan)),
        (HU, np.diag([1.0, 0, 1, 1])),
    ],
)
def test_an_invalid_scan_cannot_be_built(hu, affine):
    with pytest.raises(ValueError, match=r"hu must|affine"):
        Scan(hu=hu, affine=affine)


def test_spacing_is_x_y_z():
    assert Scan(hu=HU.copy(), affine=np.diag([0.9, -0.7, 2.5, 1])).spacing_mm == pytest.approx((0.9, 0.7, 2.5))


def test_show_draws_one_panel_for_each_window():
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    figure = Scan(hu=HU.copy(), affine=np.eye(4)).show(("lung", (40, 400)))
    assert [axis.get_title() for axis in figure.axes] == ["lung -600/1500 HU", "window 40/400 HU"]
    matplotlib.pyplot.close(figure)


def test_those_scanned_alike_share_what_says_so():
    """A hundred thousand cases are in memory at once, and were scanned in a handful of ways."""
    alike, other = (ScanHeader(kernel="B30f", patient_id=name, contrast="for Mueller") for name in ("1", "2"))
    assert alike.acquisition() is other.acquisition()
    assert ScanHeader(kernel="B30f").acquisition() != alike.acquisition()


def test_acquisition_holds_no_identity():
    header = ScanHeader(patient_id="Mueller", study_uid="1.2", site="North", kernel="B30f", slice_thickness_mm=2.5)
    assert header.acquisition()["slice_thickness_mm"] == "2.5"
    assert not {"Mueller", "1.2", "North"} & set(header.acquisition().values())


@pytest.mark.parametrize("name", WINDOWS)
def test_presets_resolve(name):
    level, width = resolve_window(name)
    assert width > 0
    assert resolve_window((level, width)) == (level, width)


@pytest.mark.parametrize("window", ["lungs", (40, 0), (40, -1)])
def test_bad_windows_raise(window):
    with pytest.raises(ValueError, match=r"lung|width"):
        resolve_window(window)


@pytest.mark.parametrize(
    "settings",
    [
        {"windows": ("lungs",)},
        {"windows": ()},
        {"windows": ((40, 0),)},
        {"size": 0},
        {"mean": (0.5, 0.5, 0.5)},
        {"mean": (0.5,), "std": (0.5,)},
        {"clahe": {"clip": 2}},
        {"orientation": "RAS"},
        {"windwos": ("lung",)},
    ],
)
def test_an_invalid_preprocessing_cannot_be_built(settings):
    with pytest.raises(ValidationError):
        Preprocessing(**settings)


def test_preprocessing_survives_json_unchanged():
    settings = Preprocessing(windows=("lung", (40, 81)), clahe={}, mean=(0.1, 0.2), std=(0.3, 0.4))
    assert Preprocessing.model_validate_json(settings.model_dump_json()) == settings


def prediction(p, threshold=None):
    return Prediction(case_id="c", patient_id="p", probabilities=p, threshold=threshold)


@pytest.mark.parametrize("p", [{"a": 1.0}, {"a": 0.6, "b": 0.6}, {"a": -0.1, "b": 1.1}, {"a": np.nan, "b": 1.0}])
def test_probabilities_are_probabilities(p):
    with pytest.raises(ValueError, match="probabilities"):
        prediction(p)


@pytest.mark.parametrize(
    ("p", "threshold", "predicted"),
    [
        ({"no": 0.7, "yes": 0.3}, None, "no"),
        ({"no": 0.7, "yes": 0.3}, 0.3, "yes"),
        ({"no": 0.4, "yes": 0.6}, 0.7, "no"),
        ({"a": 0.2, "b": 0.5, "c": 0.3}, 0.1, "b"),
    ],
)
def test_predicted_follows_the_threshold_for_two_classes(p, threshold, predicted):
    assert prediction(p, threshold).predicted == predicted


def test_row_has_the_columns_of_predictions_csv_in_order():
    row = prediction({"no": 0.7, "yes": 0.3}).to_row()
    expected = (
        "case_id patient_id label p_no p_yes predicted site sex age fold threshold study_uid series_uid flags spread "
        "ood_score"
    )
    assert list(row) == [*expected.split(), "model_sha256"]


def test_every_column_of_a_prediction_is_reserved():
    row = Prediction(case_id="c", patient_id="p", probabilities={"no": 0.5, "yes": 0.5}).to_row()
    assert {name for name in row if not name.startswith("p_")} == set(PREDICTION_COLUMNS) - {"age_band"}
