"""A sweep judges its points on validation cases, in the epoch that was kept, and on no others."""

import csv

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
    config, points = sweep(make(root, tmp_path, recorder=recorder, select=select), FOLDS[0], "rates")
    assert recorder.asked == [len(FOLDS[0].val)] * 4
    assert [point.auroc for point in points] == ([0.9, 0.8] if select == "best" else [0.6, 0.8])
    assert config.training.stages[-1].lr == chosen
    with (tmp_path / "sweep.csv").open() as stream:
        assert [float(row["val_auroc"]) for row in csv.DictReader(stream)] == [point.auroc for point in points]


def test_loss_breaks_a_tie(root, tmp_path):  # noqa: F811
    config, points = sweep(make(root, tmp_path), FOLDS[0], "rates")  # the judge says 0.5 of all
    best = min(points, key=lambda point: point.loss)
    assert points[0].loss != points[1].loss
    assert config.training.stages[-1].lr == best.settings["training.stages.-1.lr"]


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
    return [(point.settings, point.auroc, point.loss, point.best_epoch) for point in points]


def flipped(spared):
    """Labels, of which all but some are turned round."""
    return [label if index in spared else CLASSES[1 - CLASSES.index(label)] for index, label in enumerate(LABELS)]


def test_labels_of_the_test_fold_do_not_reach_the_sweep(root, tmp_path):  # noqa: F811
    found = []
    for name, labels in (("true", LABELS), ("flipped", flipped([*FOLDS[0].train, *FOLDS[0].val]))):
        experiment = make(root, tmp_path / name, labels=labels)
        experiment.judge = Judge(right, right, right)
        config, points = sweep(experiment, FOLDS[0], "rates")
        found.append((config, judged(points)))
    assert found[0] == found[1]


def test_labels_of_the_target_do_not_reach_the_sweep(root, tmp_path):  # noqa: F811
    found = []
    for name, labels in (("true", LABELS), ("flipped", flipped(range(6)))):
        experiment = towards(root, tmp_path / name, labels=labels)
        experiment.judge = Judge(right, right, right)
        config, points = sweep(experiment, TOWARDS, "rates")
        found.append((config, judged(points)))
    assert found[0] == found[1]
