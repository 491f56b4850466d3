import contextlib
import csv
import io

import pytest

from medvit.cli import schedule
from medvit.config import load_config
from medvit.models.compression import NONE, Compression
from medvit.training import pilot
from medvit.training.gradient_error import GradientError
from tests.cli.conftest import TINY

FEW = ["--epochs", "4", "--steps", "4", "training.batch_size=2", "training.patience=3"]


def schedule_tiny(site, output, *words):
    given = [str(site.folder), "--labels", str(site.labels), "--output", str(output), *TINY, *FEW, *words]
    return schedule.main(given)


@pytest.fixture(scope="module")
def told():
    """What one call has said."""
    return io.StringIO()


@pytest.fixture(scope="module")
def made(site, told, tmp_path_factory):
    """The folder that it has written."""
    output = tmp_path_factory.mktemp("schedule")
    with contextlib.redirect_stdout(told):
        assert schedule_tiny(site, output) == 3  # done, and the planted damage was set aside
    return output


def test_table_has_each_compression_at_each_point(made):
    with (made / "gradient_error.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted({row["progress"] for row in rows}) == ["0", "0.25", "0.5", "0.75", "1"]
    ways = {(float(row["keep"]), row["patch"]) for row in rows}
    assert ways == {(1, ""), (0.75, ""), (0.5, ""), (0.25, ""), (1, "16"), (0.5, "16")}
    assert len(rows) == 5 * len(ways)
    for row in rows:
        figures = {name: float(row[name]) for name in ("bias2", "variance", "cost", "ca_mse")}
        assert figures["ca_mse"] == pytest.approx(figures["bias2"] + figures["cost"] * figures["variance"], rel=1e-4)
        assert figures["cost"] > 0
        if (row["keep"], row["patch"]) == ("1.0", ""):
            assert (figures["bias2"], figures["cost"], row["cosine"]) == (0, 1, "1")


def test_picture_is_there(made):
    assert (made / "gradient_error.png").read_bytes().startswith(b"\x89PNG")


def test_schedule_is_a_config_that_training_takes(made, train_tiny, tmp_path):
    config = load_config(made / "schedule.yaml")
    assert config.training.stages[0].epochs == 2  # the training's own, not the pilot's
    assert config.training.batch_size == 2
    if (acceleration := config.objective.acceleration) is not None:
        assert acceleration.schedule[-1].from_progress <= 0.85
        assert config.training.patience == 0
    assert train_tiny(tmp_path / "run", "--config", str(made / "schedule.yaml")) == 3


def test_nothing_else_is_left_behind(made):
    assert sorted(path.name for path in made.iterdir()) == ["gradient_error.csv", "gradient_error.png", "schedule.yaml"]


def test_what_was_found_is_said(made, told):
    for words in ("best at equal compute", "schedule ", "gradient_error.png", "medvit-train --config"):
        assert words in told.getvalue()


SMALL = ["objective.pretraining.hidden=16", "objective.pretraining.width=8", "objective.pretraining.decoder_width=32"]
SEEN = "objective.acceleration={symmetric: true, schedule: [{from_progress: 0}]}"
ROUNDED = "training.stages=[{name: small, size: 36, epochs: 1}, {name: all, epochs: 1}]"  # patches of 8 px make it 40


@pytest.mark.parametrize(
    ("name", "words", "patches"),
    [
        ("mocov3", [SEEN, ROUNDED, "preprocessing.size=48"], {""}),  # 12 divides 36 and 48, and not 40
        ("dino", ["data.views.local_size=24", "objective.pretraining.prototypes=12"], {""}),  # 16 does not divide 24
        ("mae", [], {""}),  # its pixels are told by patches of one size
    ],
)
def test_pretraining_is_scheduled_without_labels(name, words, patches, site, tmp_path, monkeypatch):
    seen, sizes, measure = [], [], pilot.measure_errors

    def watched(objective, steps, *given, symmetric, **settings):
        learns = [parameter.requires_grad for parameter in objective.classifier.backbone.model.patch_embed.parameters()]
        seen.append((symmetric, any(learns)))
        steps = list(steps)
        sizes.append((objective.classifier.backbone.size, steps[0][0]["input"].shape[-1]))
        return measure(objective, steps, *given, symmetric=symmetric, **settings)

    monkeypatch.setattr(pilot, "measure_errors", watched)
    given = [str(site.folder), "--config", f"pretrain_{name}", "--output", str(tmp_path), *TINY, *SMALL, *words]
    assert schedule.main([*given, "--epochs", "4", "--steps", "4"]) == 3
    with (tmp_path / "gradient_error.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["patch"] for row in rows} == patches
    assert sorted({row["progress"] for row in rows}) == ["0", "0.25", "0.5", "0.75", "1"]
    load_config(tmp_path / "schedule.yaml")
    if ROUNDED in words:  # from the beginning at the size of the stage, and then at the next one's
        assert sizes == [(40, 40)] * 3 + [(48, 48)] * 2
    # a teacher as asked for; MoCo v3 does not let the patch projection learn
    assert set(seen) == {(name == "mocov3", name != "mocov3")}


@pytest.mark.parametrize("words", [[], [SEEN]])
def test_a_schedule_keeps_what_was_asked_of_the_teacher(words, tmp_path):
    figures = {"progress": 0.0, "bias2": 0.0, "variance": 1.0, "cosine": 1.0, "steps": 4}
    whole = GradientError(compression=NONE, tokens_share=1.0, cost=1.0, **figures)
    fewer = GradientError(compression=Compression(0.25), tokens_share=0.25, cost=0.3, **figures)
    scheduled = schedule.write([whole, fewer], load_config("pretrain_mocov3", words), tmp_path)
    assert scheduled.objective.acceleration.symmetric == bool(words)
    assert scheduled.objective.acceleration.schedule[0].keep == 0.25
    assert load_config(tmp_path / "schedule.yaml") == scheduled


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "give 4 or more"),
        (["training.stages.0.trainable=head"], "frozen one is not accelerated"),
        (["training.batch_size=16"], "comparing gradients needs 4 steps"),
    ],
)
def test_what_cannot_be_scheduled_ends_with_2(words, message, site, tmp_path, capsys):
    assert schedule_tiny(site, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
