"""A checkpoint: one safetensors file with the rest as JSON in its metadata. No pickle; whole or not there.

Lightning and nnU-Net write onto the target itself, and a kill at that moment loses both old and new (HAZARDS 3).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from medvit.io.disk import write_whole

State = dict[str, Any]


def save(path: Path, tensors: dict[str, Tensor], about: State, keep_as: Path | None = None) -> None:
    """Write tensors and a JSON-able record at once, with a checksum.

    Args:
        path: file; its folder is made when needed.
        tensors: by name; may share memory.
        about: the rest.
        keep_as: what the file that was there is called from now on; None: it is gone.

    Raises:
        DiskFullError: no room; what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # clones: safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    record = json.dumps(about)
    write_whole(path, to_bytes(copies, {"about": record, "sha256": _digest(copies, record)}), keep_as)


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


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under longer names, so that a checkpoint holds several sets."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One of the sets that `prefixed` put together."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


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
    for key, value in under("optimizer", tensors).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": about["param_groups"]})
