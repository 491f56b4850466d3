import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medvit.models.bundle import open_bundle, open_reference, save_bundle
from medvit.models.bundle_info import BundleInfo, TrainingRange, find_bundle
from medvit.models.classifier import build_classifier
from medvit.models.reference import know
from medvit.records import EXIT_USAGE, Preprocessing, UsageError

PREPROCESSING = Preprocessing(windows=("brain", (40.0, 80.0)), size=32, predict_slices=4)


@pytest.fixture
def made(tiny, tmp_path):
    """(folder, classifier, info) of a saved bundle with every field set."""
    torch.manual_seed(0)
    config = tiny(dropout=0.3, pooling_width=5)
    classifier, _ = build_classifier(config, size=32, channels=2, classes=2)
    info = BundleInfo(
        architecture=config,
        preprocessing=PREPROCESSING,
        mean=(0.4, 0.3),
        std=(0.2, 0.1),
        classes=("none", "bleed"),
        threshold=0.1 + 0.2,
        temperature=1.7,
        training_range=TrainingRange(kernels=("H30s",), slice_thickness_mm=(0.6, 5.0)),
        provenance={"seed": "0"},
    )
    folder = tmp_path / "run" / "bundle"
    return folder, classifier.eval(), save_bundle(folder, classifier, info)


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_bundle(path)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_gives_identical_logits(made):
    folder, classifier, _ = made
    slices = torch.randn(2, 3, 2, 32, 32)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(open_bundle(folder)[0](slices, mask).logits, classifier(slices, mask).logits)


def test_round_trip_of_an_mlp_head_after_changes_of_size(tiny, tmp_path):
    config = tiny(head="mlp")
    classifier, _ = build_classifier(config, size=32, channels=3, classes=2)
    for px in (16, 32):
        classifier.set_size(px)
    info = BundleInfo(
        architecture=config, preprocessing=Preprocessing(size=32), mean=(0.5,) * 3, std=(0.5,) * 3, classes=("a", "b")
    )
    save_bundle(tmp_path, classifier.eval(), info)
    slices, mask = torch.randn(2, 3, 3, 32, 32), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(open_bundle(tmp_path)[0](slices, mask).logits, classifier(slices, mask).logits)


def test_round_trip_gives_the_same_info(made):
    folder, _, info = made
    assert open_bundle(folder)[1] == info


def test_opened_classifier_is_in_evaluation_mode(made):
    assert not any(module.training for module in open_bundle(made[0])[0].modules())


def test_bundle_opens_without_the_pretrained_weights_it_started_from(made):
    folder, classifier, info = made
    architecture = info.architecture.model_copy(update={"weights": "gone.safetensors"})
    save_bundle(folder, classifier, info.model_copy(update={"architecture": architecture}))
    assert open_bundle(folder)[1].architecture.weights == "gone.safetensors"


def test_run_folder_is_as_good_as_its_bundle(made):
    folder = made[0]
    assert find_bundle(folder.parent) == find_bundle(folder) == folder


def test_missing_bundle_is_refused(tmp_path):
    assert "output folder of medvit-train" in refusal(tmp_path)


def test_missing_weights_are_refused(made):
    (made[0] / "model.safetensors").unlink()
    assert "Copy the bundle again" in refusal(made[0])


@pytest.mark.parametrize("where", [8, -1])
def test_changed_byte_in_the_weights_is_refused(where, made):
    path = made[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert "Copy the bundle again" in refusal(made[0])


@pytest.mark.parametrize(
    "changes",
    [{"threshold": 0.9}, {"classes": ["bleed", "none"]}, {"preprocessing": {"windows": ["lung", "bone"], "size": 32}}],
)
def test_changed_description_is_refused(changes, made):
    edit(made[0], **changes)
    assert "bundle.json" in refusal(made[0])


def test_other_schema_is_refused(made):
    edit(made[0], schema_version=2)
    assert "schema" in refusal(made[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff\xfe"])
def test_damaged_description_is_refused(content, made):
    (made[0] / "bundle.json").write_bytes(content)
    assert "bundle.json" in refusal(made[0])


def test_unknown_field_is_refused(made):
    edit(made[0], colour="red")
    assert "another version of medvit" in refusal(made[0])


def test_bundle_is_two_files_and_neither_is_a_pickle(made):
    files = sorted(made[0].iterdir())
    assert [file.name for file in files] == ["bundle.json", "model.safetensors"]
    json.loads(files[0].read_text())
    header = int.from_bytes(files[1].read_bytes()[:8], "little")
    json.loads(files[1].read_bytes()[8 : 8 + header])


def test_saving_again_replaces_the_bundle(made):
    folder, classifier, info = made
    save_bundle(folder, classifier, info.model_copy(update={"threshold": 0.25}))
    assert open_bundle(folder)[1].threshold == 0.25


@pytest.mark.parametrize(
    ("acquisition", "unlike"),
    [
        ({}, ()),
        ({"kernel": "h30S ", "slice_thickness_mm": "3"}, ()),  # spelled otherwise
        ({"kernel": "B70f"}, ("kernel",)),
        ({"slice_thickness_mm": "5.4"}, ()),
        ({"slice_thickness_mm": "8"}, ("slice_thickness_mm",)),
        ({"body_part": "HEAD"}, ()),  # nobody knows what it was trained on
        ({"contrast": "yes"}, ("contrast",)),
        (
            {"kernel": "B70f", "contrast": "yes", "slice_thickness_mm": "0.1"},
            ("kernel", "contrast", "slice_thickness_mm"),
        ),
    ],
)
def test_what_is_outside_the_training_range(made, acquisition, unlike):
    assert made[2].training_range.outside(acquisition) == unlike


def test_contrast_that_was_trained_on_is_known():
    assert TrainingRange(contrast=("yes",)).outside({"contrast": "yes"}) == ()


@pytest.mark.parametrize("kind", ["mahalanobis", "knn"])
def test_the_reference_travels_with_the_bundle(made, tmp_path, kind):
    features = np.random.default_rng(0).normal(size=(30, 4))
    reference = replace(know(features, kind), threshold=1.25)
    info = save_bundle(tmp_path, made[1], made[2], reference)
    again = open_reference(tmp_path, open_bundle(tmp_path)[1])
    assert (again.kind, again.threshold) == (kind, 1.25)
    assert (again.score(features) == reference.score(features)).all()
    (tmp_path / "reference.safetensors").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"reference\.safetensors"):
        open_reference(tmp_path, info)


def test_a_reference_without_threshold_flags_nothing(made, tmp_path):
    info = save_bundle(tmp_path, made[1], made[2], know(np.eye(4)))
    assert info.ood.threshold is None
    assert open_reference(tmp_path, info).threshold == math.inf
    assert open_reference(made[0], made[2]) is None
