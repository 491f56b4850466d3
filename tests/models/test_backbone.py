import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from medvit.config import ModelConfig
from medvit.io import read
from medvit.models.backbone import Backbone, build_backbone, normalisation
from medvit.records import EXIT_USAGE, UsageError

VIT = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
REGISTERS_NO_CLS = "vit_medium_patch16_reg4_gap_256"
NO_CLS = "vit_medium_patch16_gap_240"
SWIN = "swin_tiny_patch4_window7_224"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def plain_timm(path: Path, config: ModelConfig, *, channels: int = 3, size: int | None = 32) -> Any:
    fixed = {} if size is None else {"img_size": size}
    model = timm.create_model(
        config.name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "custom_load": False},
        num_classes=0,
        in_chans=channels,
        **fixed,
        **config.options,
    )
    return model.eval()


def picture(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def build(config: ModelConfig, size: int = 32, channels: int = 3) -> Backbone:
    return build_backbone(config, size=size, channels=channels)[0].eval()


def refusal(config: ModelConfig, size: int = 32, channels: int = 3) -> str:
    with pytest.raises(UsageError) as caught:
        build_backbone(config, size=size, channels=channels)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


@pytest.mark.parametrize("name", [VIT, DISTILLED, REGISTERS, REGISTERS_NO_CLS, NO_CLS])
@torch.inference_mode()
def test_tokens_of_a_weight_file_of_another_image_size_equal_plain_timm(name, tiny, weights_file):
    path = weights_file(name)
    config = tiny(name, weights=str(path))
    expected = plain_timm(path, config).forward_features(picture())
    torch.testing.assert_close(build(config).tokens(picture()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@torch.inference_mode()
def test_channels_are_adapted_as_timm_does(channels, tiny, weights_file):
    path = weights_file()
    config = tiny(weights=str(path))
    expected = plain_timm(path, config, channels=channels).forward_features(picture(channels))
    torch.testing.assert_close(build(config, channels=channels).tokens(picture(channels)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_trained_on_as_many_channels_are_taken_as_they_are(channels, tiny, weights_file):
    path = weights_file(in_chans=channels)
    stem = build(tiny(weights=str(path)), channels=channels).model.patch_embed.proj.weight
    assert torch.equal(stem, load_file(path)["patch_embed.proj.weight"])


@torch.inference_mode()
def test_resnet_comes_through_the_same_door(tiny, weights_file):
    path = weights_file("resnet10t")
    config = tiny("resnet10t", weights=str(path))
    expected = plain_timm(path, config, size=None)(picture())
    torch.testing.assert_close(build(config)(picture()), expected, atol=1e-5, rtol=1e-5)


# timm, where it resamples Swin's relative positions
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
@torch.inference_mode()
def test_swin_comes_through_the_same_door(tiny, weights_file):
    options = {"embed_dim": 24}
    path = weights_file(SWIN, img_size=64, **options)
    config = tiny(SWIN, weights=str(path), options=options)
    expected = plain_timm(path, config)(picture())
    torch.testing.assert_close(build(config)(picture()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("resnet10t", True), (VIT, False)])
def test_convolutions_get_their_slices_channels_last(name, last, tiny):
    model = (backbone := build(tiny(name))).model
    seen: list[bool] = []
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    backbone(picture())
    assert seen == [last]


def test_width_is_that_of_what_comes_out_even_where_the_pooled_head_widens(tiny):
    backbone = build(tiny("mobilenetv3_small_050"))  # num_features 288, a convolution after pooling makes 1024
    assert backbone(picture()).shape == (2, backbone.width)


@torch.inference_mode()
def test_half_precision_weights_are_computed_in_single(tiny, weights_file):
    path = weights_file(edit=lambda state: state.update({key: value.half() for key, value in state.items()}))
    assert build(tiny(weights=str(path)))(picture()).dtype == torch.float32


@torch.inference_mode()
def test_features_are_cls_and_mean_patch_token(tiny, weights_file):
    path = weights_file()
    config = tiny(weights=str(path))
    tokens = plain_timm(path, config).forward_features(picture())
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(build(config)(picture()), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_register_tokens_are_no_part_of_the_mean(tiny, weights_file):
    path = weights_file(REGISTERS)
    config = tiny(REGISTERS, weights=str(path))
    tokens = plain_timm(path, config).forward_features(picture())
    expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1)
    torch.testing.assert_close(build(config)(picture()), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_without_a_cls_token_features_are_the_mean_of_the_patches(tiny, weights_file):
    path = weights_file(REGISTERS_NO_CLS)
    config = tiny(REGISTERS_NO_CLS, weights=str(path))
    tokens = plain_timm(path, config).forward_features(picture())
    torch.testing.assert_close(build(config)(picture()), tokens[:, 4:].mean(dim=1), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_pooled_features_are_timms_own(tiny, weights_file):
    path = weights_file()
    config = tiny(weights=str(path), features="pooled")
    torch.testing.assert_close(build(config)(picture()), plain_timm(path, config)(picture()), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_weights_change_the_output(tiny, weights_file):
    path = weights_file()  # before the seeds: it draws random numbers itself
    torch.manual_seed(0)
    random = build(tiny())(picture())
    torch.manual_seed(0)
    loaded = build(tiny(weights=str(path)))(picture())
    assert (loaded - random).abs().max() > 0.1


def test_qkv_bias_is_kept(tiny, weights_file):
    path = weights_file()
    bias = build(tiny(weights=str(path))).model.blocks[1].attn.qkv.bias
    assert torch.equal(bias, load_file(path)["blocks.1.attn.qkv.bias"])


def test_report_names_the_file_and_counts_every_tensor(tiny, weights_file):
    path = weights_file()
    _, report = build_backbone(tiny(weights=str(path)), size=32, channels=3)
    assert (report.source, report.keys, len(report.sha256)) == (path.name, len(load_file(path)) - 2, 64)


def test_report_says_that_weights_are_random(tiny):
    assert build_backbone(tiny(), size=32, channels=3)[1].source == "none"


def test_missing_tensor_is_refused(tiny, weights_file):
    path = weights_file(edit=lambda state: state.pop("blocks.1.mlp.fc1.bias"))
    message = refusal(tiny(weights=str(path)))
    assert "1 tensors are missing (blocks.1.mlp.fc1.bias" in message
    assert "model.name" in message


def test_layer_scale_is_not_dropped_in_silence(tiny, weights_file):
    path = weights_file(init_values=1e-5)  # as DINOv2 has it; timm alone logs and goes on without it
    message = refusal(tiny(weights=str(path)))
    assert "4 are unexpected (blocks.0.ls1.gamma" in message
    assert "model.name" in message


def test_weights_of_another_width_are_refused(tiny, weights_file):
    path = weights_file(embed_dim=48)
    message = refusal(tiny(weights=str(path)))
    assert "does not fit" in message
    assert "model.name" in message


def test_weights_of_another_family_are_refused(tiny, weights_file):
    path = weights_file("resnet10t")
    assert "does not fit" in refusal(tiny(weights=str(path)))


def test_truncated_weights_are_refused(tiny, weights_file):
    path = weights_file()
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(tiny(weights=str(path)))
    assert "cut short" in message
    assert "Copy the file again" in message


def test_missing_weights_are_refused(tiny, tmp_path):
    message = refusal(tiny(weights=str(tmp_path / "absent.safetensors")))
    assert "no such file" in message
    assert "hub, or none" in message


def test_pickled_weights_are_refused(tiny, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({}, path)
    message = refusal(tiny(weights=str(path)))
    assert "saw .pt" in message
    assert "safetensors.torch.save_file" in message


@pytest.mark.parametrize(("size", "nearest"), [(30, "use 24 or 32"), (5, "use 8 or 8")])
def test_size_that_is_no_multiple_of_the_patch_names_the_nearest(size, nearest, tiny):
    message = refusal(tiny(), size=size)
    assert "patch of 8 px" in message
    assert nearest in message


def test_unknown_model_names_similar_ones(tiny):
    assert "vit_small_patch14_dinov2" in refusal(tiny("vit_smal_patch14_dinov2"))


def test_unknown_tag_is_refused(tiny):
    assert "nosuch" in refusal(tiny("vit_tiny_patch16_224.nosuch"))


def test_option_that_the_model_does_not_know_is_refused(tiny):
    assert "depht" in refusal(tiny(options={"depht": 2}))


def test_model_without_published_weights_is_refused(tiny):
    assert "No pretrained weights exist" in refusal(tiny("vit_base_patch16_gap_224", weights="hub"))


def test_unreachable_hub_is_refused_with_a_way_out(tmp_path):
    program = """
from medvit.config import ModelConfig
from medvit.io import read
from medvit.models.backbone import build_backbone
from medvit.records import UsageError
try:
    build_backbone(ModelConfig(name="resnet10t", weights="hub"), size=32, channels=3)
except UsageError as error:
    print(error.exit_code, error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 ")
    assert "hub is not reachable" in done.stdout
    assert ".safetensors file" in done.stdout
    assert "model.weights=none" in done.stdout


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        (VIT, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (REGISTERS, IMAGENET_MEAN, IMAGENET_STD),
        ("resnet10t", IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_normalisation_is_that_of_the_weights(name, mean, std, tiny):
    assert normalisation(build(tiny(name)), 3) == (mean, std)


@pytest.mark.parametrize("channels", [1, 4])
def test_normalisation_of_other_channel_counts_is_the_average(channels, tiny):
    mean, std = normalisation(build(tiny(REGISTERS), channels=channels), channels)
    assert mean == pytest.approx((sum(IMAGENET_MEAN) / 3,) * channels)
    assert std == pytest.approx((sum(IMAGENET_STD) / 3,) * channels)


# another input size


@pytest.mark.parametrize(
    ("patch", "px", "size"),
    [(8, 30, 32), (8, 27, 24), (8, 28, 32), (8, 3, 8), (14, 128, 126), (14, 224, 224), (16, 128, 128)],
)
def test_size_is_rounded_to_the_models_own_patch(patch, px, size, tiny):
    options = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": patch}
    backbone = build(tiny(options=options), size=2 * patch)
    assert backbone.set_size(px) == backbone.size == size
    assert backbone(picture(size=size)).shape == (2, backbone.width)


@pytest.mark.parametrize("name", [VIT, DISTILLED, REGISTERS, REGISTERS_NO_CLS, NO_CLS])
@torch.no_grad()
def test_tokens_after_a_change_of_size_equal_plain_timm_built_at_that_size(name, tiny, weights_file):
    path = weights_file(name)
    config = tiny(name, weights=str(path))
    backbone = build(config, size=64)
    backbone.set_size(32)
    torch.testing.assert_close(
        backbone.tokens(picture()), plain_timm(path, config).forward_features(picture()), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", [VIT, REGISTERS_NO_CLS])
def test_prefix_tokens_are_untouched_by_a_change_of_size(name, tiny):
    model = (backbone := build(tiny(name), size=64)).model
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backbone.set_size(32)
    after = model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"pos_embed"}
    assert torch.equal(before["pos_embed"][:, :prefix], after["pos_embed"][:, :prefix])
    assert after["pos_embed"].shape[1] == prefix + 16


@torch.no_grad()
def test_features_of_a_constant_picture_do_not_depend_on_its_size(tiny):
    backbone = build(tiny(NO_CLS), size=64)  # all tokens are alike, whatever their number
    backbone.model.pos_embed.copy_(backbone.model.pos_embed[:, :1].expand_as(backbone.model.pos_embed).clone())
    expected = backbone(torch.full((1, 3, 64, 64), 0.7))
    backbone.set_size(32)
    torch.testing.assert_close(backbone(torch.full((1, 3, 32, 32), 0.7)), expected, atol=1e-5, rtol=1e-5)


def test_change_to_the_present_size_changes_nothing(tiny):
    backbone = build(tiny())
    position = backbone.model.pos_embed
    assert backbone.set_size(33) == 32
    assert backbone.model.pos_embed is position


# timm, where it resamples Swin's relative positions
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize(("name", "px", "size"), [(SWIN, 34, 36), ("resnet10t", 34, 34)])
def test_models_without_tokens_change_size_and_back(name, px, size, tiny):
    backbone = build(tiny(name, options={"embed_dim": 24} if name == SWIN else {}), size=64)
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    assert backbone.set_size(px) == size
    backbone(picture(size=size)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    backbone.set_size(64)
    assert {key: value.shape for key, value in backbone.state_dict().items()} == shapes


def test_what_was_frozen_stays_frozen_when_the_size_changes(tiny):
    backbone = build(tiny(), size=64)
    backbone.set_trainable("top", 1)
    before = {name: p.requires_grad for name, p in backbone.named_parameters()}
    backbone.set_size(32)
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == before


def test_model_built_for_one_size_refuses_another(tiny):
    backbone = build(tiny("mixer_s32_224"))
    with pytest.raises(UsageError, match=r"from 32 to 64 px. Leave out size in all stages"):
        backbone.set_size(64)


# gradient checkpointing


def gradients(backbone: Backbone, slices: Tensor) -> dict[str, Tensor]:
    """Of one training step with its dropout and drop-path drawn from a fixed seed."""
    backbone.zero_grad()
    backbone.train()
    torch.manual_seed(5)
    backbone(slices).square().sum().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trainable", ["all", "top"])
@pytest.mark.parametrize("name", [VIT, SWIN])
def test_checkpointing_leaves_each_gradient_as_it_was(name, trainable, tiny):
    options = {"embed_dim": 24} if name == SWIN else {"depth": 4, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
    backbone = build(tiny(name, options={**options, "proj_drop_rate": 0.2}, drop_path=0.3))
    backbone.set_trainable(trainable, 2)
    expected = gradients(backbone, picture())
    backbone.set_gradient_checkpointing(True)
    found = gradients(backbone, picture())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(value.abs().max() > 0 for value in found.values())


def test_checkpointing_is_not_reentrant_whatever_the_environment_says(tiny):
    backbone = build(tiny())  # reentrant, blocks whose input is frozen learn nothing
    backbone.set_trainable("top", 2)
    timm.layers.set_reentrant_ckpt(True)
    try:
        backbone.set_gradient_checkpointing(True)
        found = gradients(backbone, picture())
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert all(value.abs().max() > 0 for name, value in found.items() if "norm" not in name)
    assert {f"model.blocks.{block}.mlp.fc1.weight" for block in (0, 1)} < found.keys()


def test_checkpointing_keeps_one_input_per_block_and_can_be_turned_off(tiny, kept_bytes):
    kept = {}
    for depth in (2, 6):
        options = {"depth": depth, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
        backbone = build(tiny(options=options)).train()
        plain = kept_bytes(backbone, lambda backbone=backbone: backbone(picture()))
        backbone.set_gradient_checkpointing(True)
        kept[depth] = kept_bytes(backbone, lambda backbone=backbone: backbone(picture()))
        backbone.set_gradient_checkpointing(False)
        assert kept_bytes(backbone, lambda backbone=backbone: backbone(picture())) == plain > kept[depth]
    assert kept[6] - kept[2] == 4 * 2 * 17 * 32 * 4  # blocks x pictures x tokens x width x bytes


def test_checkpointing_keeps_nothing_of_frozen_blocks(tiny, kept_bytes):
    backbone = build(tiny(options={"depth": 6, "embed_dim": 32, "num_heads": 2, "patch_size": 8})).train()
    backbone.set_gradient_checkpointing(True)
    kept = {}
    for blocks in (1, 2, 6):
        backbone.set_trainable("top", blocks)
        kept[blocks] = kept_bytes(backbone, lambda: backbone(picture()))
    assert kept[2] - kept[1] == (kept[6] - kept[2]) / 4 == 2 * 17 * 32 * 4


def test_checkpointing_with_batch_norm_is_refused(tiny):  # its statistics would count each batch twice
    backbone = build(tiny("resnet10t"))
    with pytest.raises(UsageError, match=r"training.gradient_checkpointing: .*BatchNorm"):
        backbone.set_gradient_checkpointing(True)
    backbone.set_gradient_checkpointing(False)


def test_checkpointing_that_the_model_does_not_have_is_refused(tiny):
    backbone = build(tiny("sequencer2d_s"))
    with pytest.raises(UsageError, match=r"training.gradient_checkpointing: timm has none"):
        backbone.set_gradient_checkpointing(True)
    backbone.set_gradient_checkpointing(False)


# attention


def kernels(backbone: Backbone) -> list[str]:
    with torch.autograd.profiler.profile() as profile:
        backbone(picture())
    return [event.name for event in profile.function_events if "_scaled_dot_product" in event.name]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", [VIT, DISTILLED, REGISTERS])
def test_fused_kernel_is_called_by_each_block_in_training_and_in_evaluation(name, training, tiny):
    backbone = build(tiny(name)).train(training)
    assert backbone.fused_attention()
    with torch.set_grad_enabled(training):
        assert kernels(backbone) == ["aten::_scaled_dot_product_flash_attention_for_cpu"] * 2


def test_attention_that_is_not_fused_is_told(tiny, caplog):
    timm.layers.set_fused_attn(False)  # as an environment variable of timm can
    try:
        backbone = build(tiny())
    finally:
        timm.layers.set_fused_attn(True)
    assert not backbone.fused_attention()
    assert kernels(backbone) == []
    assert f"{VIT}: its attention is not torch's fused one" in caplog.text


def test_one_block_that_is_not_fused_is_found(tiny, caplog):
    backbone = build(tiny())
    assert not caplog.text
    backbone.model.blocks[1].attn.fused_attn = False
    assert not backbone.fused_attention()


def test_model_without_attention_has_nothing_to_fuse(tiny):
    assert build(tiny("resnet10t")).fused_attention()


@pytest.mark.realdata
@torch.inference_mode()
def test_real_weights_equal_plain_timm(real_data):
    path = real_data.parent / "weights" / "vit_small_patch14_dinov2.safetensors"
    config = ModelConfig(name="vit_small_patch14_dinov2.lvd142m", weights=str(path))
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = timm.create_model(
        config.name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, img_size=224
    ).eval()
    torch.testing.assert_close(
        build(config, size=224).tokens(image), expected.forward_features(image), atol=1e-4, rtol=0
    )


@pytest.mark.realdata
@torch.no_grad()
def test_real_weights_see_the_same_slice_at_another_size(real_data):
    path = real_data.parent / "weights" / "vit_small_patch14_dinov2.safetensors"
    backbone = build(ModelConfig(name="vit_small_patch14_dinov2.lvd142m", weights=str(path)), size=224)
    files = sorted((real_data / "siim_ct_100").rglob("*.dcm"))[:60:10]
    soft = torch.stack([torch.from_numpy((read(file).hu[0] + 160) / 400).clamp(0, 1) for file in files])
    slices = torch.nn.functional.interpolate(soft[:, None], size=224, mode="area").expand(-1, 3, -1, -1)
    full = torch.nn.functional.normalize(backbone((slices - 0.45) / 0.225), dim=1)
    assert backbone.set_size(128) == 126
    smaller = torch.nn.functional.interpolate(slices, size=126, mode="area")
    small = torch.nn.functional.normalize(backbone((smaller - 0.45) / 0.225), dim=1)
    alike = full @ small.T
    assert alike.diag().min() > 0.9
    assert (alike.argmax(dim=1) == torch.arange(len(files))).all()  # each slice is most like itself
