"""SynQT against plain timm, the frozen blocks' own forward pass, and what it may keep for the backward pass."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from medvit.config import ModelConfig
from medvit.models import synqt
from medvit.models.backbone import build_backbone
from medvit.models.synqt import Adapter, Combination, SynQT, answered
from medvit.records import UsageError

MIB = 2**20
TRUNKS = {
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 8},
    "vit_medium_patch16_reg4_gap_256": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    "vit_base_patch32_clip_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
}
"""Without and with registers, distillation token, LayerScale, norm before the blocks, without CLS."""


def build(name="vit_tiny_patch16_224", prompts=3, options=(), **settings) -> SynQT:
    config = ModelConfig(
        name=name,
        weights="none",
        tuning="synqt",
        prompts=prompts,
        options=TRUNKS.get(name, {}) | dict(options),
        **settings,
    )
    torch.manual_seed(0)
    backbone = build_backbone(config, size=32, channels=3, kind=SynQT)[0]
    assert isinstance(backbone, SynQT)
    with torch.no_grad():
        for value in backbone.parameters():  # LayerScale starts at 1e-5, adapters at 0: nothing would show
            value.add_(0.05 * torch.rand_like(value))
    backbone.set_trainable("all", 3)
    return backbone


def slices(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TRUNKS)
def test_what_the_trunk_sees_is_what_plain_timm_sees_bit_for_bit(name):
    backbone = build(name, drop_path=0.5).train()
    options = {**TRUNKS[name], "img_size": 32}
    plain = timm.create_model(name, num_classes=0, **options).eval()
    plain.load_state_dict(backbone.model.state_dict())
    entering = []
    for block in plain.blocks:
        block.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    with torch.no_grad():
        plain.forward_features(slices())
    assert torch.equal(backbone.trunk(slices()), torch.cat(entering, dim=1))
    assert backbone.trunk(slices()).shape[1:] == backbone.trunk_shape


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_attn_norm": True}, {"qkv_bias": False}])
@pytest.mark.parametrize("name", TRUNKS)
def test_queries_that_are_the_blocks_own_tokens_are_answered_as_the_block_does(name, options):
    backbone = build(name, options=options.items()).eval()
    block, tokens = backbone.model.blocks[1], torch.randn(2, 7, backbone.width)
    answer, attended, processed = answered(block, tokens, tokens)
    torch.testing.assert_close(answer, block(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer, tokens + attended + processed)


def test_each_query_is_answered_by_itself():
    backbone = build().eval()
    block, tokens, queries = backbone.model.blocks[0], torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    together = answered(block, queries, tokens)[0]
    for number in range(5):
        torch.testing.assert_close(together[:, number : number + 1], answered(block, queries[:, [number]], tokens)[0])


def plain_features(backbone, entering):
    """The equations of METHODS written out: explicit softmax, one sample and one block after the other."""
    found = []
    for sample in range(len(entering[0])):
        answer, answers = torch.zeros(1, backbone.width), []
        for synthesis, block, tokens in zip(backbone.syntheses, backbone.model.blocks, entering, strict=True):
            x = synthesis.project(synthesis.prompts + backbone.below * answer)
            own, z = synthesis.attention, synthesis.norm_attention(x)
            q, k, v = own.queries(own.norm_queries(z)), own.keys(own.norm_keys(z)), own.values(own.norm_keys(z))
            x = x + synthesis.attention_scale * own.out((q @ k.T / backbone.width**0.5).softmax(-1) @ v)
            x = x + synthesis.adapter_scale * synthesis.adapt(synthesis.norm_adapter(x))
            every = block.norm1(torch.cat([x, tokens[sample]]))
            q, k, v = block.attn.qkv(every).view(len(every), 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
            q, k, v = q[:, : len(x)], k[:, len(x) :], v[:, len(x) :]
            weights = (q @ k.mT * block.attn.head_dim**-0.5).softmax(-1)
            attended = block.ls1(block.attn.proj((weights @ v).transpose(0, 1).flatten(1)))
            processed = block.ls2(block.mlp(block.norm2(x + attended)))
            answer = (x + attended + processed).mean(0, keepdim=True)
            answers += [answer, attended.mean(0, keepdim=True), processed.mean(0, keepdim=True)]
        head = backbone.combination
        tokens = [token + head.adapt(head.norm(token)) for token in (answer, *answers)]
        weights = [1.0, *torch.tanh(nn.functional.gelu(head.weigh(tokens[0]))).flatten()]
        found.append(head.out(sum(w * token for w, token in zip(weights, tokens, strict=True)) / len(tokens)))
    return torch.cat(found)


@pytest.mark.parametrize("prompts", [1, 3])
def test_features_are_those_of_the_equations(prompts):
    backbone = build(prompts=prompts).eval()
    entering = backbone.trunk(slices()).chunk(3, dim=1)
    torch.testing.assert_close(backbone(slices()), plain_features(backbone, entering), atol=1e-5, rtol=1e-5)


def test_answers_of_blocks_are_dropped_in_training_and_the_last_one_never_is():
    """DropPath 0.3 of each answer where they are put together (METHODS of the paper's code), and not of the last."""
    torch.manual_seed(0)
    mixed = Combination(8, 12, nn.LayerNorm(8)).train()
    mixed.dropout.p = mixed.adapt.dropout.p = 0.0
    last, answers = torch.randn(200, 8), torch.randn(200, 36, 8)
    seen = []
    mixed.drop_token.register_forward_hook(lambda _module, _given, dropped: seen.append(dropped.abs().sum(dim=1) == 0))
    mixed(last, answers)
    assert float(seen[0].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert seen[0].view(200, 36).any(dim=1).all()  # each case loses answers of its own
    mixed.drop_token.drop_prob = 1 - 1e-9  # nothing but the last is left
    torch.testing.assert_close(mixed(last, answers), mixed(last, torch.randn(200, 36, 8)))
    assert not torch.allclose(mixed(last, answers), mixed(last + 1, answers))


def test_a_tenth_of_what_adapters_queries_and_attention_say_is_dropped_in_training():
    layers = [module for module in build().modules() if type(module) is synqt.Dropout]
    assert len(layers) > 20
    assert {layer.p for layer in layers} == {0.1}
    values = torch.ones(100, 100)
    for layer in layers:
        assert float((layer.train()(values) == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
        assert torch.equal(layer.eval()(values), values)


def test_an_adapter_starts_as_nothing():
    x = torch.randn(2, 3, 8)
    assert torch.equal(Adapter(8, 4).eval()(x), x)


def test_no_gradient_reaches_the_trunk_and_all_beside_it_learns():
    backbone = build().train()
    values = slices()
    backbone(values).square().sum().backward()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    beside = {name: p for name, p in backbone.named_parameters() if not name.startswith("model.")}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in beside.values())


def test_gradients_are_those_of_finite_differences():
    backbone = build(prompts=2).eval().double()
    states = backbone.trunk(slices(1).double())
    names = ["below", "syntheses.0.prompts", "syntheses.1.attention.keys.down.bias", "combination.weigh.bias"]
    chosen = [dict(backbone.named_parameters())[name] for name in names]

    def loss(*values):
        with torch.no_grad():
            for parameter, value in zip(chosen, values, strict=True):
                parameter.copy_(value)
        return backbone.finish(states).square().sum()

    gradients = torch.autograd.grad(loss(*[p.detach().clone() for p in chosen]), chosen)
    for number, (parameter, gradient) in enumerate(zip(chosen, gradients, strict=True)):
        here = [p.detach().clone() for p in chosen]
        step = torch.zeros_like(parameter)
        step.view(-1)[0] = 1e-6
        with torch.no_grad():
            up, down = (loss(*[v + s * step if k == number else v for k, v in enumerate(here)]) for s in (1, -1))
            loss(*here)
        assert float((up - down) / 2e-6) == pytest.approx(float(gradient.view(-1)[0]), rel=1e-4, abs=1e-6)


def test_what_the_trunk_gave_is_finished_to_the_same_features():
    backbone = build().eval()
    assert torch.equal(backbone.finish(backbone.trunk(slices())), backbone(slices()))


def test_drop_path_never_touches_the_frozen_trunk():
    backbone = build(drop_path=0.9).train()
    assert torch.equal(backbone.trunk(slices()), backbone.trunk(slices()))
    assert not any(module.training for module in backbone.model.modules())


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        backbone = build().train()
        backbone.set_gradient_checkpointing(recompute)
        torch.manual_seed(5)
        backbone(slices()).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(("prompts", "recompute", "most"), [(1, False, 16), (16, False, 28), (1, True, 9)])
def test_bytes_kept_for_the_backward_pass_of_vit_b(prompts, recompute, most, kept_bytes):
    config = ModelConfig(name="vit_base_patch16_224", weights="none", tuning="synqt", prompts=prompts)
    backbone = build_backbone(config, size=224, channels=3, kind=SynQT)[0]
    backbone.set_trainable("all", 3)
    backbone.set_gradient_checkpointing(recompute)
    backbone.train()
    assert kept_bytes(backbone, lambda: backbone(slices(1, 224))) <= most * MIB


def test_memory_does_not_grow_with_tokens_that_only_the_trunk_sees(kept_bytes):
    backbone = build(prompts=1).train()
    kept = [kept_bytes(backbone, lambda n=n: backbone(slices(n))) for n in (1, 9)]
    tokens = backbone.trunk_shape[0]
    assert (kept[1] - kept[0]) / 8 < 1.5 * (
        2 * tokens * backbone.width * 4
    ) + 40_000  # keys and values, and little else


def test_stages_reach_what_they_name():
    backbone = build()
    learning = {}
    for trainable in ("head", "top", "all"):
        backbone.set_trainable(trainable, 1)
        learning[trainable] = {
            name.split(".")[0] + name.split(".")[1]
            for name, p in backbone.named_parameters()
            if p.requires_grad and "." in name
        }
    assert learning["head"] == set()
    assert {name[:10] for name in learning["top"]} == {"combinatio", "syntheses2"}
    assert {"syntheses0", "syntheses1", "syntheses2"} < learning["all"]


def test_another_size_is_taken():
    backbone = build().eval()
    assert backbone.set_size(48) == 48
    assert backbone(slices(size=48)).shape == (2, backbone.width)
    assert backbone.trunk(slices(size=48)).shape[1:] == backbone.trunk_shape


def test_who_asks_how_pixels_matter_is_told():
    backbone = build().eval().requires_grad_(False)
    values = slices().requires_grad_()
    backbone(values).sum().backward()
    assert values.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"),
        *("vit_base_patch16_rpn_224", "naflexvit_base_patch16_gap"),  # blocks or embedding of another kind
    ],
)
def test_models_without_plain_blocks_are_refused(name):
    config = ModelConfig(name=name, weights="none", tuning="synqt", options={"depth": 1} if "base" in name else {})
    with pytest.raises(UsageError, match="not made of timm's plain blocks"):
        build_backbone(config, size=224, channels=3, kind=SynQT)


def test_a_vit_without_blocks_is_refused():
    with pytest.raises(UsageError, match="plain blocks"):
        SynQT(SimpleNamespace(num_features=8), ModelConfig(), 32)
