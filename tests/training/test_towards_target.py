"""What adaptation did is told apart from the result, and needs no target label where it selects."""

import json
import math

import numpy as np
import pytest
import torch

from medvit.config import Config
from medvit.data.cache import SliceCache
from medvit.data.splits import Fold
from medvit.records import UsageError
from medvit.training.adaptation import information, probe
from medvit.training.experiment import Experiment, Judge
from medvit.training.material import Reporter
from tests.training.test_experiment import CLASSES, LABELS, Recorder, cases_of, root  # noqa: F401  a fixture

TOWARDS = Fold(np.array([0, 1, 2, 3]), np.array([4, 5]), np.array([6, 7]), np.array([8, 9]))
"""Cases 6 to 9 are of the target; 6 and 7 are judged."""


def clouds(apart, count=60, seed=0):
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(2, count, 8)).astype(np.float32)
    return source, target + np.float32(apart)


def patients(count):
    return np.array([f"p{index}" for index in range(count)])


def test_probe_tells_sites_apart_where_they_differ_and_guesses_where_they_do_not():
    near, far = (probe(*clouds(apart), patients(120)) for apart in (0, 2))
    assert near.accuracy == pytest.approx(0.5, abs=0.15)
    assert far.accuracy > 0.95
    assert far.mmd > 10 * near.mmd


def test_probe_does_not_recognise_patients():
    """Each patient's cases are copies: a probe that saw one of them would know the others."""
    source, target = clouds(0, count=12)
    again = [np.repeat(side, 10, axis=0) for side in (source, target)]
    found = probe(*again, np.repeat(patients(24), 10))
    assert found.accuracy < 0.75


def test_probe_of_unequal_sites_is_balanced():
    source, target = clouds(0, count=200)
    assert probe(source, target[:20], patients(220)).accuracy == pytest.approx(0.5, abs=0.15)


def test_probe_of_a_single_patient_is_unknown():
    source, target = clouds(0, count=5)
    assert math.isnan(probe(source, target, np.array(["a"] * 5 + ["b"] * 5)).accuracy)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0], [0, 1]], 1),  # sure, and not of one class for all
        ([[1, 0], [1, 0]], 0),  # collapsed
        ([[0.5, 0.5], [0.5, 0.5]], 0),  # unsure
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 1),
    ],
)
def test_information_of_predictions(rows, expected):
    assert information(np.array(rows, float)) == pytest.approx(expected, abs=1e-6)


def towards(root, folder, recorder=None, labels=LABELS, **settings):  # noqa: F811
    tree = {
        "preprocessing": {"size": 32, "train_slices": 2, "predict_slices": 4},
        "data": {"augment": None, "target_sites": ["South"]},
        "objective": {"name": "dann"},
        "model": {
            "name": "vit_tiny_patch16_224",
            "weights": "none",
            "options": {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16},
        },
        "training": {"stages": [{"epochs": 2, "lr": 1e-2}], "batch_size": 2, "device": "cpu", "threads": 1},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        tree[section][name] = value
    config = Config.model_validate(tree)
    cases = [
        one if index < 6 else type(one)(**{**vars(one), "site": "South"})
        for index, one in enumerate(cases_of(root, labels))
    ]
    slices = SliceCache(folder / "cache", config.preprocessing)
    return Experiment(config, cases, CLASSES, slices, folder, (recorder or Recorder()).judge())


def best(folder):
    from safetensors.torch import load_file  # noqa: PLC0415

    return load_file(folder / "checkpoints" / "fold0" / "best.safetensors")


@pytest.mark.parametrize("name", ["dann", "cdan", "mmd"])
def test_source_target_and_oracle_are_told_apart(name, root, tmp_path):  # noqa: F811
    # validation, then the oracle, of each epoch; then source (no test case here) and target
    recorder = Recorder((0.6, 0.9, 0.8, 0.3, 0.7))
    experiment = towards(root, tmp_path, recorder, objective__name=name)
    result = experiment.run([TOWARDS])
    found = json.loads((tmp_path / "adaptation.json").read_text())
    assert result.histories[0].best_epoch == 2  # by validation, whatever the oracle says
    assert (found["source"], found["target"]) == (None, 0.7)
    assert (found["oracle"], found["oracle_epoch"]) == (0.9, 1)
    assert found["mmd"] is not None
    assert [row["val_oracle_auroc"] for row in result.histories[0].rows] == [0.9, 0.3]
    assert {p.case_id for p in result.predictions} == {"case6", "case7"}


@pytest.mark.parametrize(("name", "costly"), [("dann", True), ("supervised", False)])
def test_what_adaptation_costs_the_sources_is_told(name, costly, root, tmp_path):  # noqa: F811
    """A domain head that is too strong takes the classes along with the sites, and validation sees it."""
    recorder, said = Recorder((0.9, 0.9, 0.6, 0.3, 0.7)), []
    experiment = towards(root, tmp_path, recorder, objective__name=name, training__select="last")
    experiment.material.reporter = experiment.reporter = Reporter(say=said.append)
    experiment.run([TOWARDS])
    assert json.loads((tmp_path / "adaptation.json").read_text())["lost"] == pytest.approx(0.3)
    assert any("AUROC 0.70 at the target" in line for line in said)
    assert any("has cost the sources 0.30" in line for line in said) == costly


def test_target_labels_do_not_reach_the_weights(root, tmp_path):  # noqa: F811
    flipped = [CLASSES[1 - CLASSES.index(label)] if index > 5 else label for index, label in enumerate(LABELS)]
    for name, labels in (("true", LABELS), ("flipped", flipped)):
        towards(root, tmp_path / name, labels=labels).run_fold(TOWARDS, 0)
    first, second = best(tmp_path / "true"), best(tmp_path / "flipped")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_target_pixels_reach_the_weights(root, tmp_path):  # noqa: F811
    towards(root, tmp_path / "dann").run_fold(TOWARDS, 0)
    towards(root, tmp_path / "weak", objective__strength=0.0).run_fold(TOWARDS, 0)
    first, second = best(tmp_path / "dann"), best(tmp_path / "weak")
    assert not all(torch.equal(first[name], second[name]) for name in first if "backbone" in name)


def test_without_adaptation_the_same_split_leaves_the_target_alone(root, tmp_path):  # noqa: F811
    experiment = towards(root, tmp_path, objective__name="supervised")
    model = experiment._model(TOWARDS.train)
    _, dataset = experiment._learning(model, TOWARDS.train, TOWARDS.target)
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    experiment.run([TOWARDS])
    assert (tmp_path / "adaptation.json").is_file()


def test_an_epoch_is_selected_without_target_labels_where_asked(root, tmp_path):  # noqa: F811
    experiment = towards(root, tmp_path, training__select="target")
    rows = experiment.run([TOWARDS]).histories[0].rows
    assert all(0 <= row["val_target_information"] <= 1 for row in rows)


def test_adaptation_without_a_target_is_refused(root, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match=r"name data\.target_sites"):
        towards(root, tmp_path).run([Fold(TOWARDS.train, TOWARDS.val, TOWARDS.test)])


def test_domains_are_the_sites_in_use(root, tmp_path):  # noqa: F811
    experiment = towards(root, tmp_path)
    model = experiment._model(TOWARDS.train)
    _, dataset = experiment._learning(model, TOWARDS.train, TOWARDS.target)
    assert dataset.labels.tolist() == [0, 1, 0, 1, -1, -1]
    assert dataset.domains.tolist() == [0, 0, 0, 0, 1, 1]


def test_judges_are_asked_for_nothing_where_nothing_is_known(root, tmp_path):  # noqa: F811
    def never(labels, probabilities):
        assert len(labels) > 0
        return 0.5

    experiment = towards(root, tmp_path)
    experiment.judge = Judge(never, never, never)
    unlabelled = Fold(TOWARDS.train, TOWARDS.val, np.array([], np.intp), np.array([6, 7, 8, 9]))
    experiment.run([unlabelled])
    found = json.loads((tmp_path / "adaptation.json").read_text())
    assert (found["target"], found["oracle"], found["oracle_epoch"]) == (None, None, 0)


@pytest.mark.parametrize("select", ["best", "target"])
def test_target_labels_do_not_reach_what_selects_the_epoch(select, root, tmp_path):  # noqa: F811
    """They change the oracle and nothing else of what is written down."""

    def right(labels, probabilities):
        return float(probabilities[range(len(labels)), labels].mean())

    flipped = [CLASSES[1 - CLASSES.index(label)] if index > 5 else label for index, label in enumerate(LABELS)]
    seen = []
    for name, labels in (("true", LABELS), ("flipped", flipped)):
        experiment = towards(root, tmp_path / name, labels=labels, training__select=select)
        experiment.judge = Judge(right, right, right)
        seen.append(experiment.fit_fold(TOWARDS, tmp_path / name / "fit", name)[1])
    left_out = {"val_oracle_auroc", "waiting_share"}
    rows = [[{k: v for k, v in row.items() if k not in left_out} for row in history.rows] for history in seen]
    assert rows[0] == rows[1]
    assert seen[0].best_epoch == seen[1].best_epoch
    oracles = [[row["val_oracle_auroc"] for row in history.rows] for history in seen]
    assert oracles[0] != oracles[1]
