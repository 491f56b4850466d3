"""A sweep judges its points on validation cases, in the epoch that was kept, and on no others."""

import csv
import json

import numpy as np
import pytest

from medvit.config import Stage
from medvit.training.experiment import Judge
from medvit.training.grid import sweep
from tests.training.test_experiment import CLASSES, FOLDS, LABELS, Recorder, make, root  # noqa: F401  a fixture
from tests.training.test_towards_target import TOWARDS, towards

RATES = {"rates": {"training.stages.-1.lr": (1e-2, 1e-3)}}


@pytest.fixture(autouse=True)
def _two_points(monkeypatch):
    monkeypatch.setattr("medvit.training.grid.GRIDS", RATES)


@pytest.mark.parametrize(("select", "chosen"), [("best", 1e-2), ("last", 1e-3)])
def test_point_is_chosen_by_validation_in_the_epoch_that_was_kept(select, chosen, root, tmp_path):  # noqa: F811
    recorder = Recorder((0.9, 0.6, 0.7, 0.8))  # two points of two epochs
    best, points = sweep(make(root, tmp_path, recorder=recorder, select=select), FOLDS[0], "rates")
    assert recorder.asked == [len(FOLDS[0].val)] * 4
    assert [point.auroc for point in points] == ([0.9, 0.8] if select == "best" else [0.6, 0.8])
    assert best.config.training.stages[-1].lr == chosen
    with (tmp_path / "sweep.csv").open() as stream:
        assert [float(row["val_auroc"]) for row in csv.DictReader(stream)] == [point.auroc for point in points]


@pytest.mark.parametrize(
    ("grid", "tried"),
    [
        ({"training.stages.-1.lr": (1e-4, 1e-3)}, [1e-2, 1e-4, 1e-3]),
        ({"training.stages.-1.lr": (1e-3, 1e-2)}, [1e-2, 1e-3]),  # not tried twice
        ({"training.stages.-1.lr": (1e-3,), "training.stages.-1.weight_decay": (0.01, 0.05)}, [1e-2, 1e-3, 1e-3]),
    ],
)
def test_settings_as_configured_are_tried_first_and_may_win(grid, tried, root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("medvit.training.grid.GRIDS", {"rates": grid})
    experiment = make(root, tmp_path, recorder=Recorder((0.9, 0.9) + (0.8,) * 4))  # of two epochs each
    best, points = sweep(experiment, FOLDS[0], "rates")
    assert [point.settings["training.stages.-1.lr"] for point in points] == tried
    assert [point.config.training.stages[-1].lr for point in points] == tried
    assert best.config == experiment.config
    with (tmp_path / "sweep.csv").open() as stream:
        assert [float(row["training.stages.-1.lr"]) for row in csv.DictReader(stream)] == tried


def test_loss_breaks_a_tie(root, tmp_path):  # noqa: F811
    chosen, points = sweep(make(root, tmp_path), FOLDS[0], "rates")  # the judge says 0.5 of all
    best = min(points, key=lambda point: point.loss)
    assert points[0].loss != points[1].loss
    assert chosen == best
    assert chosen.config.training.stages[-1].lr == best.settings["training.stages.-1.lr"]


def test_the_row_of_the_best_epoch_is_found_where_patience_left_others_out(root, tmp_path):  # noqa: F811
    """Epochs are counted as planned: after an early end they are not the numbers of the rows."""
    scores = (0.6, 0.5, 0.9) * 2  # the first stage ends after two of four epochs, the second has one
    stages = [{"epochs": 4, "lr": 1e-2}, {"epochs": 1, "lr": 1e-2}]
    experiment = make(root, tmp_path, recorder=Recorder(scores), patience=1)
    training = experiment.config.training.model_copy(update={"stages": tuple(map(Stage.model_validate, stages))})
    experiment.config = experiment.config.model_copy(update={"training": training})
    _, points = sweep(experiment, FOLDS[0], "rates")
    assert [(point.best_epoch, point.auroc) for point in points] == [(5, 0.9)] * 2


def right(labels, probabilities):
    """A judge that every label matters to."""
    return float(probabilities[np.arange(len(labels)), labels].mean())


def judged(points):
    """All but the probe, which may be NaN."""
    return [(point.settings, point.score, point.best_epoch) for point in points]


def flipped(spared):
    """Labels, of which all but some are turned round."""
    return [label if index in spared else CLASSES[1 - CLASSES.index(label)] for index, label in enumerate(LABELS)]


def test_labels_of_the_test_fold_do_not_reach_the_sweep(root, tmp_path):  # noqa: F811
    found = []
    for name, labels in (("true", LABELS), ("flipped", flipped([*FOLDS[0].train, *FOLDS[0].val]))):
        experiment = make(root, tmp_path / name, labels=labels)
        experiment.judge = Judge(right, right, right)
        best, points = sweep(experiment, FOLDS[0], "rates")
        found.append((best.config, judged(points)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "chosen"), [("dann", 1.0), ("supervised", 0.0)])
def test_adaptation_is_chosen_by_unlabelled_target_cases_too(name, chosen, root, tmp_path, monkeypatch):  # noqa: F811
    """Validation at the sources alone would prefer none: what adaptation is for is elsewhere."""
    monkeypatch.setattr("medvit.training.grid.GRIDS", {"strength": {"objective.strength": (0.0, 1.0)}})
    informative = iter((0.5, 0.1))  # with, then without
    monkeypatch.setattr("medvit.training.grid.information", lambda blind: next(informative))
    recorder = Recorder((0.7, 0.9, 0.7, 0.9, 0.8, 0.3, 0.8, 0.3))  # of each epoch: validation, then the oracle
    experiment = towards(root, tmp_path, recorder, objective__name=name)
    best, points = sweep(experiment, TOWARDS, "strength")
    assert best.config.objective.strength == chosen
    assert [point.target_information for point in points] == [0.5, 0.1]
    with (tmp_path / "sweep.csv").open() as stream:
        assert [row["target_information"] for row in csv.DictReader(stream)] == ["0.5000", "0.1000"]


def test_information_is_that_of_target_cases_in_the_epoch_that_was_kept(root, tmp_path):  # noqa: F811
    """The figure that training.select=target writes for each epoch."""
    _, points = sweep(towards(root, tmp_path, training__select="target"), TOWARDS, "rates")
    for number, point in enumerate(points):
        lines = (tmp_path / "sweep" / f"{number:02d}" / "metrics.jsonl").read_text().splitlines()
        kept = json.loads(lines[point.best_epoch - 1])
        assert point.target_information == pytest.approx(kept["val_target_information"], abs=1e-6)


def test_labels_of_the_target_do_not_reach_the_sweep(root, tmp_path):  # noqa: F811
    found = []
    for name, labels in (("true", LABELS), ("flipped", flipped(range(6)))):
        experiment = towards(root, tmp_path / name, labels=labels)
        experiment.judge = Judge(right, right, right)
        best, points = sweep(experiment, TOWARDS, "rates")
        found.append((best.config, judged(points)))
    assert found[0] == found[1]
