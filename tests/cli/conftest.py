"""One small hospital and one small trained run, shared by the command tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from medvit.cli import train
from medvit.io import phantom
from medvit.models.bundle import open_bundle, open_reference, save_bundle

TINY = [
    "preprocessing.size=32",
    "preprocessing.train_slices=4",
    "model.name=vit_tiny_patch16_224",
    "model.weights=none",
    "model.options={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "training.stages.0.epochs=2",
    "training.batch_size=4",
    "evaluation.bootstrap=100",
    "evaluation.robustness.minutes=0.05",
]


@dataclass(frozen=True)
class Site:
    """A synthetic hospital on disk."""

    folder: Path
    labels: Path
    planted: dict[str, str]
    patients: int


def _write(root: Path, patients: int, seed: int) -> Site:
    written = phantom.write_hospital(
        root / "hospital", phantom.make_patients(patients, seed), seed=seed + 1, matrix=40, slices=8
    )
    planted = {name: str(code) for name, code in written.planted.items()}
    return Site(written.folder, written.labels, planted, patients)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return _write(tmp_path_factory.mktemp("site"), 24, 1)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return _write(tmp_path_factory.mktemp("export"), 4, 7)


@pytest.fixture(scope="session")
def train_tiny(site: Site) -> Callable[..., int]:
    """Train on the hospital with a tiny model; returns the exit code."""

    def run(output: Path, *extra: str) -> int:
        return train.main([str(site.folder), "--labels", str(site.labels), "--output", str(output), *TINY, *extra])

    return run


@pytest.fixture(scope="session")
def trained(train_tiny: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    assert train_tiny(output) == 3  # done, and the planted damage was set aside
    return output


@pytest.fixture
def for_one_vendor(trained: Path, tmp_path: Path) -> Path:
    """A bundle of the trained model that must not be asked about scanners of other makers than GE."""
    classifier, info = open_bundle(trained)
    seen = info.training_range.model_copy(update={"manufacturers": ("GE MEDICAL SYSTEMS",)})
    narrow = info.model_copy(update={"training_range": seen, "refuse": ("manufacturer",)})
    save_bundle(tmp_path / "narrow", classifier, narrow, open_reference(trained, info))
    return tmp_path / "narrow"
