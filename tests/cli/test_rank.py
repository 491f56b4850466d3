import csv
import json
import math
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from medvit import cli
from medvit.cli import rank
from medvit.config import load_config
from medvit.models.source import build_source_classifier
from medvit.models.weights import source_classes
from tests.cli.conftest import TINY

OTHER = "test_vit.r160_in1k"
"""timm's smallest: 16 px patches, a classifier of 1,000 classes."""


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    """The backbone of the trained run, under timm's names."""
    folder = tmp_path_factory.mktemp("weights")
    own = load_file(trained / "bundle" / "model.safetensors")
    prefix = "backbone.model."
    save_file({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}, folder / "good.safetensors")
    torch.manual_seed(0)
    with_head = timm.create_model(OTHER, num_classes=7)
    save_file(with_head.state_dict(), folder / "other.safetensors")
    return folder


@pytest.fixture
def rank_tiny(site, capsys):
    """Rank on the hospital; returns exit code, stdout and stderr."""

    def run(*words):
        code = rank.main([str(site.folder), "--labels", str(site.labels), *words, *TINY])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_who_will_judge_does_not_choose(weights, rank_tiny):
    code, out, err = rank_tiny(
        "--json", "--weights", str(weights / "good.safetensors"), "data.holdout_sites=[Harbour Hospital]"
    )
    assert code == 3
    assert "8 labelled cases are kept for judging" in err
    assert json.loads(out)["cases"] == 16


def test_a_run_is_not_ranked_by_the_labels_that_it_has_learned(trained, weights, rank_tiny):
    code, _, err = rank_tiny("--weights", str(trained))
    assert code == 4
    assert "LEAKAGE" in err
    sites = "data.holdout_sites=[Harbour Hospital,Hill University,North Clinic]"
    code, _, err = rank_tiny("--weights", str(weights / "good.safetensors"), sites)
    assert code == 2
    assert "0 labelled cases are left to rank by" in err


def test_ranking_holds_all_candidates_once_best_probe_first(weights, rank_tiny, site, tmp_path):
    good, other = weights / "good.safetensors", f"{OTHER}={weights / 'other.safetensors'}"
    words = ["--output", str(tmp_path / "ranking"), "--json", "--weights", str(good), other, str(good)]
    code, out, _ = rank_tiny(*words)
    assert code == 3  # done, and the planted damage was set aside
    found = json.loads(out)
    assert found == json.loads((tmp_path / "ranking" / "ranking.json").read_text())
    standings = {one["weights"]: one for one in found["standings"]}
    assert set(standings) == {str(good), other, "none"}
    assert len(found["standings"]) == 3
    points = [one["auroc"]["point"] for one in found["standings"]]
    assert points == sorted(points, reverse=True)
    scratch = standings["none"]
    assert (scratch["gain"]["point"], scratch["normalised_gain"]) == (0, 0)
    for one in found["standings"]:
        assert one["gain"]["point"] == pytest.approx(one["auroc"]["point"] - scratch["auroc"]["point"])
        assert 0 <= one["nearest_neighbour"] <= 1
        assert 0 <= one["h_score"] <= 1
        assert len(one["sites"]) == 2
        assert math.isfinite(one["logme"] + one["site_distance"])
        assert (one["leep"] is None) == (one["weights"] != other)
    assert standings[other]["leep"] <= 0
    assert found["patients"] == site.patients
    patients = [point["patients"] for point in found["label_curve"]]
    assert len(patients) == 4
    assert patients == sorted(patients)
    with site.labels.open(encoding="utf-8", newline="") as stream:
        assert not any(row["patient_id"] in out for row in csv.DictReader(stream))


def test_table_says_what_it_is_ordered_by_and_what_it_is_worth(weights, rank_tiny):
    code, out, _ = rank_tiny("--weights", str(weights / "good.safetensors"), "preprocessing.size=40")
    assert code == 3
    for words in (
        "probe AUROC",
        "none (random)",
        "Ordered by the linear probe",
        "mean nothing",
        "by labelled patients",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("nowhere.safetensors", "no such file"),
        ("{folder}/other.safetensors", "does not fit"),
        ("vit_nonsense={folder}/good.safetensors", "timm cannot build"),
        ("=good.safetensors", "MODEL=FILE"),
        ("none", "Name weights"),
    ],
)
def test_a_wrong_candidate_ends_with_2_before_the_folder_is_read(candidate, message, weights, rank_tiny):
    candidate = candidate.format(folder=weights)
    code, out, err = rank_tiny(
        "--weights", str(weights / "good.safetensors") if candidate != "none" else "none", candidate
    )
    assert code == 2
    assert message in err
    assert "reading headers" not in err
    assert not out


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("preprocessing.size=56", True),
        ("vit_small_patch14_dinov2.lvd142m=vit.safetensors", False),
        ("vit.safetensors", False),
        ("hub", False),
        ("data=hub", False),
    ],
)
def test_settings_after_weights_are_told_from_candidates(word, expected):
    assert rank.is_setting(word) == expected


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path):
    path = tmp_path / "seed=3.safetensors"
    path.touch()
    first, scratch = rank.read_candidates([str(path)], load_config())
    assert first.model.weights == str(path)
    assert first.model.name == scratch.model.name
    assert scratch.model.weights == "none"


def test_source_classifier_gives_the_probabilities_of_plain_timm(weights):
    config = load_config("baseline", [f"model.name={OTHER}", f"model.weights={weights / 'other.safetensors'}"]).model
    assert source_classes(config) == 7
    source = build_source_classifier(config, size=160, channels=3)
    plain = timm.create_model(OTHER, num_classes=7).eval()
    plain.load_state_dict(load_file(weights / "other.safetensors"))
    slices = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(source.eval()(slices), plain(slices).softmax(dim=1))
    assert source_classes(config.model_copy(update={"weights": "hub"})) == 1000
    assert source_classes(config.model_copy(update={"weights": "none"})) == 0
    assert build_source_classifier(config.model_copy(update={"weights": "none"}), size=160, channels=3) is None


def test_help_is_quick_and_teaches(capsys):
    assert cli.main(["rank", "-h"]) == 0
    assert "MODEL=FILE" in capsys.readouterr().out
    program = "import sys, medvit.cli.rank; sys.exit(bool({'torch', 'monai', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
