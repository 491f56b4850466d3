"""Exports of many small series, some of them bad, and a small model to run over them."""

import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
from ct_builder import Ct, phantom_hu

from medvit.inference import Model
from tests.evaluation.models import small_model

NOON = datetime(2026, 11, 28, 12, 0, 0)
SLICES = 4
ALWAYS_DIFFERS = {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", ".lock", "audit.jsonl"}
"""What tells how often a run was interrupted."""


def make_model(seed: int = 0) -> Model:
    """Random weights, a threshold, and a hash as of a bundle."""
    one = small_model(("0", "1"))
    info = one.info.model_copy(update={"weights_sha256": f"5eed{seed}".ljust(64, "0"), "threshold": 0.5})
    return Model(one.encoder, info)


def series(number: int, slices: int = SLICES) -> Ct:
    """A series in a study and of a patient of its own, unlike the others."""
    hu = phantom_hu(slices) + np.random.default_rng(number).integers(-200, 200, (slices, 1, 1))
    return Ct(study=number + 1, patient=f"P{number}", hu=np.clip(hu, -1000, 3000))


def write_export(folder: Path, count: int, bad: float = 0.1, seed: int = 0) -> int:
    """Series in folders of their own, a share of them spoiled, each in another way; returns how many."""
    rng = random.Random(seed)
    spoiled = rng.sample(range(count), round(bad * count))
    for number in range(count):
        paths = series(number).write(folder / f"{number:05d}")
        if number in spoiled:
            WAYS[spoiled.index(number) % len(WAYS)](paths)
    return len(spoiled)


def cut(paths: list[Path]) -> None:
    """A transfer that broke off."""
    paths[1].write_bytes(paths[1].read_bytes()[:-200])


def lose(paths: list[Path]) -> None:
    """A slice that never came."""
    paths[1].unlink()


def garble(paths: list[Path]) -> None:
    """Something else under the name of an image."""
    paths[2].write_bytes(b"no image" * 100)


WAYS: tuple[Callable[[list[Path]], None], ...] = (cut, lose, garble)


def outputs(folder: Path) -> dict[str, bytes]:
    """What a run has left, by name, without what always differs."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ALWAYS_DIFFERS
    }
