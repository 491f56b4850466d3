"""A ViT of two blocks, weight files made from plain timm models, and what a forward pass keeps for the backward one."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from medvit.config import ModelConfig

VIT = "vit_tiny_patch16_224"
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}

Tiny = Callable[..., ModelConfig]
WeightsFile = Callable[..., Path]


def make_tiny(name: str = VIT, **settings: Any) -> ModelConfig:
    options = TINY if name.startswith(("vit", "deit")) else {}
    return ModelConfig(name=name, **{"weights": "none", "options": options, **settings})


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Move every tensor, norms and biases too: one that is not loaded shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
            value.add_(0.1 * torch.rand(value.shape, generator=generator))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return make_tiny


@pytest.fixture(scope="session")
def kept_bytes() -> Callable[[torch.nn.Module, Callable[[], object]], int]:
    """Bytes that a forward pass keeps for the backward one, without the model's own parameters and buffers."""

    class Kept:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    def count(model: torch.nn.Module, forward: Callable[[], object]) -> int:
        own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        alive: weakref.WeakSet[Kept] = weakref.WeakSet()  # autograd drops some again before the pass has ended

        def pack(value: torch.Tensor) -> Kept:
            alive.add(kept := Kept(value))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.value):
            result = forward()
        storages = {kept.value.untyped_storage().data_ptr(): kept.value.untyped_storage() for kept in alive}
        del result
        return sum(storage.nbytes() for address, storage in storages.items() if address not in own)

    return count


@pytest.fixture
def weights_file(tmp_path: Path) -> WeightsFile:
    def write(name: str = VIT, *, edit: Callable[[dict[str, Any]], object] | None = None, **arguments: Any) -> Path:
        fixed = {"img_size": 64, **TINY} if name.startswith(("vit", "deit")) else {}
        classes = 0 if "dinov2" in name else 10  # published without a classifier
        model = timm.create_model(name, **{"num_classes": classes, **fixed, **arguments})
        randomise(model, 7)
        state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
        if edit is not None:
            edit(state)
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        return path

    return write
