import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from medvit.config import load_config
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.pooling import POOLINGS, GatedAttention, MaxPooling, MeanPooling
from medvit.records import UsageError

VIT, SWIN, RESNET = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t"
RANDOM_TRUNK = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "proj_drop_rate": 0.5}


@pytest.fixture
def build(tiny):
    def make(*arguments, **settings) -> CtClassifier:
        torch.manual_seed(0)
        return build_classifier(tiny(*arguments, **settings), size=32, channels=3, classes=3)[0]

    return make


@pytest.fixture
def slices() -> Tensor:
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def learns(classifier: CtClassifier, slices: Tensor) -> set[str]:
    """Names of the backbone's parameters that a backward pass gives a gradient."""
    classifier.zero_grad()
    classifier(slices, all_of(slices)).logits.square().sum().backward()
    return {name for name, p in classifier.backbone.model.named_parameters() if p.grad is not None}


def all_of(slices: Tensor) -> Tensor:
    return torch.ones(slices.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_slices_never_change_the_logits(pooling, build, slices):
    classifier = build(pooling=pooling).eval()
    with_garbage = torch.cat([slices, torch.full_like(slices, 1e4)], dim=1)
    mask = torch.cat([all_of(slices), ~all_of(slices)], dim=1)
    expected = classifier(slices, all_of(slices)).logits
    torch.testing.assert_close(classifier(with_garbage, mask).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_features_never_change_the_logits(pooling, build):
    classifier = build(pooling=pooling).eval()
    features = torch.randn(2, 4, classifier.backbone.width, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    expected = classifier(features[:, :2], mask[:, :2]).logits
    torch.testing.assert_close(classifier(features, mask).logits, expected, atol=1e-6, rtol=1e-6)


def test_padded_slices_get_no_gradient(build, slices):
    classifier = build()
    slices.requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    classifier(slices, mask).logits.square().sum().backward()
    assert (slices.grad[0, 2] == 0).all()
    assert (slices.grad[0, 1] != 0).any()


def test_features_give_the_logits_of_their_slices(build, slices):
    classifier = build().eval()
    features = classifier.backbone(slices.flatten(0, 1)).unflatten(0, slices.shape[:2])
    expected = classifier(slices, all_of(slices)).logits
    torch.testing.assert_close(classifier(features, all_of(slices)).logits, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_batch_of_one_scan_of_one_slice_trains(name, build, slices):
    classifier = build(name).train()
    classifier.set_trainable("head")
    classifier(slices[:1, :1], torch.ones(1, 1, dtype=torch.bool)).logits.sum().backward()
    assert classifier.head[1].weight.grad.isfinite().all()


def test_frozen_backbone_gets_no_gradient(build, slices):
    classifier = build().train()
    classifier.set_trainable("head")
    classifier(slices, all_of(slices)).logits.square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in classifier.backbone.parameters())
    assert all(p.grad is not None for p in (*classifier.head.parameters(), *classifier.pooling.parameters()))


def test_frozen_backbone_stays_in_evaluation_mode_inside_what_is_trained(build):
    classifier = build()
    classifier.set_trainable("head")
    nn.Sequential(classifier).train()
    assert not any(module.training for module in classifier.backbone.modules())
    assert classifier.head.training


def test_frozen_backbone_has_no_dropout_or_drop_path(build, slices):
    classifier = build(options=RANDOM_TRUNK, drop_path=0.5)
    classifier.set_trainable("head")
    classifier.train()
    first, second = (classifier(slices, all_of(slices)).logits for _ in range(2))
    assert torch.equal(first, second)


def test_thawed_backbone_has_dropout_and_drop_path(build, slices):
    classifier = build(options=RANDOM_TRUNK, drop_path=0.5).train()
    first, second = (classifier(slices, all_of(slices)).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_frozen_batch_norm_keeps_its_statistics(build, slices):
    classifier = build("resnet10t")
    classifier.set_trainable("head")
    classifier.train()
    before = classifier.backbone.model.bn1.running_mean.clone()
    classifier(slices, all_of(slices))
    assert torch.equal(classifier.backbone.model.bn1.running_mean, before)


def test_freezing_during_training_takes_effect_at_once(build):
    classifier = build().train()
    classifier.set_trainable("head")
    assert not classifier.backbone.training


def test_thawing_brings_gradient_and_training_mode_back(build, slices):
    classifier = build().train()
    classifier.set_trainable("head")
    classifier.set_trainable("all")
    classifier(slices, all_of(slices)).logits.square().sum().backward()
    assert classifier.backbone.training
    assert all(p.grad is not None for p in classifier.backbone.parameters())


TOPS = {  # the last block and the final norm
    VIT: ({}, ("blocks.1.", "norm.")),
    "deit_tiny_distilled_patch16_224": ({}, ("blocks.1.", "norm.")),
    "vit_small_patch14_reg4_dinov2": ({}, ("blocks.1.", "norm.")),
    SWIN: ({"options": {"embed_dim": 12}}, ("layers.3.blocks.1.", "norm.")),
    RESNET: ({}, ("layer4.0.",)),
    "convnext_atto": ({}, ("stages.3.blocks.1.", "head.norm.")),
}


@pytest.mark.parametrize("name", TOPS)
def test_top_trains_the_last_block_and_the_final_norm_and_nothing_else(name, build, slices):
    settings, prefixes = TOPS[name]
    classifier = build(name, **settings).train()
    classifier.set_trainable("top", 1)
    every = {parameter for parameter, _ in classifier.backbone.model.named_parameters()}
    assert learns(classifier, slices) == {parameter for parameter in every if parameter.startswith(prefixes)} != set()
    assert all(p.grad is not None for p in (*classifier.head.parameters(), *classifier.pooling.parameters()))


def test_top_two_of_twelve_are_10_and_11_and_not_1(build, slices):
    classifier = build(options={"depth": 12, "embed_dim": 16, "num_heads": 2, "patch_size": 16}).train()
    classifier.set_trainable("top", 2)
    assert {name.split(".")[1] for name in learns(classifier, slices) if name.startswith("blocks.")} == {"10", "11"}


def test_top_of_more_blocks_than_there_are_trains_all_blocks_and_no_embedding(build, slices):
    classifier = build().train()
    classifier.set_trainable("top", 5)
    assert {name.split(".")[0] for name in learns(classifier, slices)} == {"blocks", "norm"}


def test_all_after_top_trains_embeddings_tokens_and_final_norm_too(build, slices):
    classifier = build("deit_tiny_distilled_patch16_224").train()
    for trainable in ("head", "top", "all"):
        classifier.set_trainable(trainable, 1)
    found = learns(classifier, slices)
    assert found == {name for name, _ in classifier.backbone.model.named_parameters()}
    assert {"pos_embed", "cls_token", "dist_token", "patch_embed.proj.weight", "norm.weight"} < found


def test_frozen_norm_dropout_and_drop_path_below_the_top_rest(build):
    options = {**RANDOM_TRUNK, "depth": 3, "pos_drop_rate": 0.5, "patch_drop_rate": 0.5}
    classifier = build(options=options, drop_path=0.5)
    classifier.set_trainable("top", 1)
    nn.Sequential(classifier).train()
    model = classifier.backbone.model
    below = [model.patch_embed, model.pos_drop, model.patch_drop, model.norm_pre, model.blocks[0], model.blocks[1]]
    assert not any(module.training for part in below for module in part.modules())
    assert all(module.training for part in (model.blocks[2], model.norm) for module in part.modules())


def test_batch_norm_below_the_top_keeps_its_statistics_and_the_top_learns_its_own(build, slices):
    classifier = build(RESNET)
    classifier.set_trainable("top", 1)
    classifier.train()
    model = classifier.backbone.model
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    classifier(slices, all_of(slices))
    moved = {norm for norm, mean in zip(norms, before, strict=True) if not torch.equal(norm.running_mean, mean)}
    assert moved == {module for module in model.layer4.modules() if isinstance(module, nn.BatchNorm2d)}


def test_frozen_parts_keep_no_activations(build, slices, kept_bytes):
    classifier = build(options={**RANDOM_TRUNK, "depth": 8}).train()
    features = torch.randn(2, 3, classifier.backbone.width)
    head = kept_bytes(classifier, lambda: classifier(features, all_of(slices)).logits)
    kept = {}
    for trainable, blocks in (("head", 1), ("top", 1), ("top", 2), ("all", 1)):
        classifier.set_trainable(trainable, blocks)
        kept[trainable, blocks] = kept_bytes(classifier, lambda: classifier(slices, all_of(slices)).logits) - head
    block = kept["top", 2] - kept["top", 1]
    assert kept["head", 1] < 0.02 * block  # where features are put in their places
    assert kept["all", 1] - kept["top", 1] == pytest.approx(7 * block, rel=0.05)


@pytest.mark.parametrize("features", ["cls_mean", "pooled"])
@pytest.mark.parametrize("name", ["vit_medium_patch16_reg4_gap_256", "vit_base_patch16_siglip_224"])
def test_each_trainable_parameter_gets_a_gradient_whichever_features_are_used(name, features, build, slices):
    # otherwise several processes wait for a gradient that never comes
    classifier = build(name, features=features).train()
    classifier.set_trainable("all")
    assert learns(classifier, slices) == {n for n, p in classifier.backbone.model.named_parameters() if p.requires_grad}


def test_drop_path_grows_linearly_with_depth(build):
    options = {"depth": 5, "embed_dim": 16, "num_heads": 2, "patch_size": 16}
    blocks = build(options=options, drop_path=0.4).backbone.model.blocks
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in blocks]
    assert rates[0] == []
    assert [pytest.approx([0.1 * k] * 2) for k in range(1, 5)] == rates[1:]


@pytest.mark.parametrize("name", [VIT, SWIN, RESNET])
def test_drop_path_is_of_training_only(name, build, slices):
    settings = {"options": {"embed_dim": 12}} if name == SWIN else {}
    classifier = build(name, drop_path=0.9, **settings)
    plain = build(name, **settings).eval()
    plain.load_state_dict(classifier.state_dict())
    expected = plain(slices, all_of(slices)).logits
    assert torch.equal(classifier.eval()(slices, all_of(slices)).logits, expected)
    if name != RESNET:  # BatchNorm of training differs by itself
        assert not torch.equal(classifier.train()(slices, all_of(slices)).logits, expected)


def test_drop_path_of_null_is_refused_and_zero_is_none(build):
    with pytest.raises(UsageError, match=r"model.drop_path"):
        load_config(overrides=["model.drop_path=null"])
    assert not [m for m in build(drop_path=0).modules() if isinstance(m, DropPath)]


def test_mlp_head_is_two_layers_with_their_dropouts(build):
    head = build(head="mlp").head
    assert [module.p for module in head if isinstance(module, nn.Dropout)] == [0.5, 0.3]
    assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)] == [(512, 64), (3, 512)]


def test_mlp_head_is_no_linear_map_and_its_dropout_is_of_training_only(build):
    head = build(head="mlp").head.eval()
    first, second = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    shift = head(torch.zeros(4, 64))
    assert not torch.allclose(head(first + second) - shift, head(first) + head(second) - 2 * shift, atol=1e-3)
    assert torch.equal(head(first), head(first))
    head.train()
    assert not torch.equal(head(first), head(first))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_last_batch_of_one_trains_with_either_head(head, build, slices):
    classifier = build(head=head).train()
    logits = classifier(slices[:1], all_of(slices[:1])).logits
    logits.square().sum().backward()
    assert logits.shape == (1, 3)
    assert all(p.grad.isfinite().all() for p in classifier.head.parameters())


def test_dropout_of_the_linear_head_is_not_ignored_by_the_mlp(build):
    with pytest.raises(UsageError, match=r"model.dropout .* model.head mlp"):
        build(head="mlp", dropout=0.2)


def test_parameter_counts_tell_trainable_from_all(build):
    classifier = build()
    trainable, total = classifier.parameter_counts()
    classifier.set_trainable("head")
    trunk = sum(p.numel() for p in classifier.backbone.parameters())
    assert trainable == total
    assert classifier.parameter_counts() == (total - trunk, total)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])  # head.norm, conv_head
def test_heads_of_the_backbone_itself_are_frozen_with_it(name, build, slices):
    classifier = build(name).train()
    classifier.set_trainable("head")
    assert [parameter for parameter, _ in classifier.backbone.model.named_parameters() if "head" in parameter]
    assert learns(classifier, slices) == set()


def test_pooled_is_one_vector_per_study_and_all_that_the_head_reads(build, slices):
    classifier = build().eval()
    output = classifier(slices, torch.tensor([[True, True, False], [True, True, True]]))
    assert output.pooled.shape == (2, classifier.backbone.width)
    torch.testing.assert_close(output.logits, classifier.head(output.pooled))


@pytest.mark.parametrize(("name", "kind"), [("attention", GatedAttention), ("mean", MeanPooling), ("max", MaxPooling)])
def test_pooling_is_the_one_that_was_asked_for(name, kind, build):
    assert type(build(pooling=name).pooling) is kind


def test_width_of_the_attention_pooling_is_the_one_that_was_asked_for(build):
    pooling = build(pooling_width=24).pooling
    assert pooling.value.out_features == pooling.gate.out_features == 24


def test_dropout_of_the_linear_head_is_the_one_that_was_asked_for(build):
    assert build(dropout=0.3).head[0].p == 0.3
