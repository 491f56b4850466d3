"""One switch for what of a backbone learns: what moves, what does not, and that bundles keep it."""

import subprocess
import sys

import pytest
import torch

from medvit.config import ModelConfig
from medvit.models.bundle import BundleInfo, open_bundle, save_bundle
from medvit.models.classifier import build_classifier
from medvit.models.tuning import TUNINGS
from medvit.records import Preprocessing, UsageError

VIT = {"depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


def build(tuning, **settings):
    torch.manual_seed(0)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=VIT, tuning=tuning, **settings)
    return config, build_classifier(config, size=32, channels=3, classes=2)[0]


def scans(grad=False):
    values = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return values.requires_grad_(grad), torch.tensor([[True, True, True], [True, True, False]])


def learning(classifier):
    return {name for name, parameter in classifier.backbone.named_parameters() if parameter.requires_grad}


def test_nothing_of_a_probed_backbone_learns_whatever_the_stage_says():
    _, classifier = build("linear")
    for trainable in ("head", "top", "all"):
        classifier.set_trainable(trainable)
        assert learning(classifier) == set()
    assert sum(p.requires_grad for p in classifier.parameters()) > 0


def test_low_rank_changes_learn_and_nothing_else_does():
    _, classifier = build("lora", lora_rank=4)
    classifier.set_trainable("all")
    assert {name.split(".")[-3] for name in learning(classifier)} == {"lora_A", "lora_B"}
    count = sum(p.numel() for p in classifier.backbone.parameters() if p.requires_grad)
    assert count == 3 * 4 * (32 + 96)
    classifier.set_trainable("top", 1)
    assert {name.split(".")[2] for name in learning(classifier)} == {"2"}
    classifier.set_trainable("head")
    assert learning(classifier) == set()


def test_a_low_rank_change_starts_as_none_and_is_alpha_over_rank_times_its_product():
    plain, low = build("full")[1].eval(), build("lora", lora_rank=4)[1].eval()
    values = scans()[0].flatten(0, 1)
    assert torch.equal(plain.backbone(values), low.backbone(values))
    layer, weight = low.backbone.model.blocks[1].attn.qkv, plain.backbone.model.blocks[1].attn.qkv.weight
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        weight.add_(2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)  # alpha is twice the rank
    torch.testing.assert_close(plain.backbone(values), low.backbone(values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_step_moves_what_learns_and_not_what_does_not(tuning):
    _, classifier = build(tuning, prompts=2)  # attention of one query over itself has nothing to choose
    classifier.set_trainable("all")
    classifier.train()
    before = {name: value.detach().clone() for name, value in classifier.named_parameters()}
    mine = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(mine, lr=0.01)
    for _ in range(2):  # the second factor of a low-rank change starts at zero, and the first learns nothing with it
        optimizer.zero_grad()
        classifier(*scans()).logits.square().sum().backward()
        optimizer.step()
    unmoved = {name for name, value in classifier.named_parameters() if torch.equal(value, before[name])}
    assert unmoved == {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_bundle_predicts_what_was_trained(tuning, tmp_path):
    config, classifier = build(tuning)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.05 * torch.rand_like(parameter))
    info = BundleInfo(
        architecture=config,
        preprocessing=Preprocessing(size=32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        classes=("a", "b"),
    )
    save_bundle(tmp_path, classifier, info)
    loaded, kept = open_bundle(tmp_path)
    assert kept.architecture.tuning == tuning
    assert torch.equal(loaded(*scans()).logits, classifier.eval()(*scans()).logits)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_the_trunk_gave_goes_through_the_classifier_as_slices_do(tuning):
    classifier = build(tuning)[1].eval()
    values, mask = scans()
    states = torch.zeros(*mask.shape, *classifier.backbone.trunk_shape)
    with torch.no_grad():
        states[mask] = classifier.backbone.trunk(values[mask])
        for plain, cached in zip(classifier(values, mask), classifier(states, mask), strict=True):
            torch.testing.assert_close(plain, cached, atol=1e-6, rtol=1e-6)


def test_low_rank_needs_a_joint_projection():
    config = ModelConfig(name="resnet18", weights="none", tuning="lora")
    with pytest.raises(UsageError, match="no joint projection"):
        build_classifier(config, size=32, channels=3, classes=2)


def test_without_peft_low_rank_says_what_to_install():
    code = """
import sys
sys.modules["peft"] = None
from medvit.config import ModelConfig
from medvit.models.classifier import build_classifier
config = ModelConfig(name="vit_tiny_patch16_224", weights="none", tuning="lora")
build_classifier(config, size=224, channels=3, classes=2)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'medvit[lora]'" in done.stderr
