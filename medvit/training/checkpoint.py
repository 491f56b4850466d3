"""Checkpoints: one safetensors file with the rest as JSON in its metadata. No pickle; whole or not there.

Lightning and nnU-Net write onto the target itself, and a kill at that moment loses both old and new (HAZARDS 3).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Any]


def save(path: Path, tensors: dict[str, Tensor], about: State) -> None:
    """Write tensors and a JSON-able record, atomically: temporary file, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # clones: safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    record = json.dumps(about)
    save_file(copies, part, {"about": record, "sha256": _digest(copies, record)})
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    part.replace(path)


def load(path: Path) -> tuple[dict[str, Tensor], State] | None:
    """Tensors and record; None where there is no whole checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError):
        return None
    record = kept.get("about", "")
    if kept.get("sha256") != _digest(tensors, record):  # safetensors itself has no checksum
        return None
    return tensors, json.loads(record)


def _digest(tensors: dict[str, Tensor], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], State]:
    """The optimizer's tensors, and its groups as JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, entry in state["state"].items()
        for name, value in entry.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], about: State) -> None:
    """Put back what `pack_optimizer` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": about["param_groups"]})
