"""From a folder without labels to a backbone, and from the backbone to a classifier."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import medvit
from medvit.cli import rank, train
from medvit.inference import Encoder
from medvit.models.bundle import open_bundle
from medvit.records import UsageError
from tests.cli.conftest import TINY

SMALL = [
    "objective.pretraining.hidden=16",
    "objective.pretraining.width=8",
    "training.threads=1",
    "training.stages.0.epochs=2",
    "preprocessing.train_slices=3",
]
OF = {name: ["--config", f"pretrain_{name}"] for name in ("simclr", "mocov3", "dino", "mae")}
OF["dino"] += ["data.views.local_size=16", "objective.pretraining.prototypes=12"]
OF["mae"] += ["objective.pretraining.decoder_width=32"]

Pretrain = Callable[..., int]


@pytest.fixture(scope="module")
def pretrain(site) -> Pretrain:
    def run(name: str, output: Path, *extra: str) -> int:
        settings = [one for one in TINY if not one.startswith("preprocessing.train_slices")]
        return train.main([str(site.folder), *OF[name], "--output", str(output), *settings, *SMALL, *extra])

    return run


@pytest.fixture(scope="module")
def backbone(pretrain, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pretrained") / "backbone"
    assert pretrain("mocov3", output) == 3  # done, and the planted damage was set aside
    return output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_folder_without_labels_becomes_a_bundle_without_classes(backbone, site):
    assert {"config.yaml", "cases.csv", "metrics.jsonl", "checkpoints", "bundle"} <= {
        p.name for p in backbone.iterdir()
    }
    _, info = open_bundle(backbone)
    assert info.classes == ()
    assert info.provenance["objective"] == "mocov3"
    identity = {row["patient_id"] for row in rows(site.labels)}
    for path in backbone.rglob("*.*"):
        if path.suffix in {".csv", ".json", ".jsonl", ".yaml"}:
            assert not any(name in path.read_text(encoding="utf-8-sig") for name in identity), path


def test_all_cases_take_part_and_no_patient_is_on_both_sides(backbone, site):
    cases = rows(backbone / "cases.csv")
    assert len({row["patient_id"] for row in cases}) == site.patients
    sides = {name: {row["patient_id"] for row in cases if row["split"] == name} for name in ("train", "val")}
    assert len(sides["train"]) + len(sides["val"]) == site.patients
    assert sides["val"]


def test_each_epoch_tells_what_was_left_out_and_whether_the_encoder_sees(backbone):
    lines = metrics(backbone)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "masked_pairs", "negatives", "momentum", "lr"} <= set(lines[0])
    assert lines[0]["masked_pairs"] > 0  # three slices of each patient
    assert lines[0]["val_effective_rank"] > 1.2
    assert lines[0]["val_collapsed"] == 0
    assert "val_auroc" not in lines[0]


def test_a_backbone_alone_does_not_predict(backbone):
    with pytest.raises(UsageError, match="pretrained without labels"):
        medvit.load_bundle(backbone)


@pytest.mark.parametrize("name", ["simclr", "dino", "mae"])
def test_the_other_methods_come_through_the_same_door(name, pretrain, tmp_path):
    assert pretrain(name, tmp_path / "run", "training.stages.0.epochs=1") == 3
    (line,) = metrics(tmp_path / "run")
    assert line["val_collapsed"] == 0
    assert open_bundle(tmp_path / "run")[1].provenance["objective"] == name


def test_the_teacher_of_dino_is_what_is_kept(pretrain, tmp_path):
    run = tmp_path / "run"
    assert pretrain("dino", run, "training.stages.0.epochs=1") == 3
    kept = load_file(run / "bundle" / "model.safetensors")
    last = load_file(run / "checkpoints" / "pretraining" / "last.safetensors")
    of_backbone = [name for name in kept if name.startswith("backbone.")]
    assert all(torch.equal(kept[name], last[f"objective.slow_{name}"]) for name in of_backbone)
    assert not all(torch.equal(kept[name], last[f"objective.classifier.{name}"]) for name in of_backbone)


def test_a_collapse_is_said_loudly_and_written_down(pretrain, tmp_path, monkeypatch, capfd):
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *given: 0 * encode(*given) + 1)  # the same of everything
    assert pretrain("dino", tmp_path / "run", "training.stages.0.epochs=1") == 3
    assert "COLLAPSE" in capfd.readouterr().err
    (line,) = metrics(tmp_path / "run")
    assert line["val_collapsed"] == 1
    assert line["val_effective_rank"] == pytest.approx(1)


# fine-tuning

FROZEN = ["training.stages.0.trainable=head", "training.stages.0.epochs=1", "data.augment=null"]


@pytest.mark.parametrize("folder", [".", "bundle"])
def test_its_weights_are_what_fine_tuning_starts_from(folder, backbone, train_tiny, tmp_path, capfd):
    assert train_tiny(tmp_path / "run", f"model.weights={backbone / folder}", *FROZEN) == 3
    assert "patients who judge were in the pretraining, without labels" in capfd.readouterr().err
    learned, started = (load_file(run / "bundle" / "model.safetensors") for run in (tmp_path / "run", backbone))
    of_backbone = [name for name in started if name.startswith("backbone.")]
    assert len(of_backbone) > 20
    assert all(torch.equal(learned[name], started[name]) for name in of_backbone)
    info, pretrained = (
        json.loads((run / "bundle" / "bundle.json").read_text()) for run in (tmp_path / "run", backbone)
    )
    assert (info["mean"], info["std"]) == (pretrained["mean"], pretrained["std"])
    assert info["architecture"]["weights"] == info["provenance"]["pretrained"] == "backbone"
    assert info["provenance"]["pretrained_sha256"] == pretrained["weights_sha256"]


def test_another_size_is_taken(backbone, train_tiny, tmp_path):
    assert train_tiny(tmp_path / "run", f"model.weights={backbone}", *FROZEN, "preprocessing.size=40") == 3


OTHER_SLICES = {
    "windows": (["preprocessing.windows=[brain,bone,lung]"], "preprocessing.windows was"),
    "clahe": (["preprocessing.clahe={}"], "preprocessing.clahe was"),
    "orientation": (["preprocessing.orientation=as_stored"], "preprocessing.orientation was"),
    "mean": (["preprocessing.mean=[0,0,0]", "preprocessing.std=[1,1,1]"], "preprocessing.mean was"),
    "statistics": (["data.normalise=training"], "has seen other slices"),
    "model": (["model.options={patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}"], "does not fit"),
    "channels": (["preprocessing.windows=[lung,bone]"], "model.weights"),
}


@pytest.mark.parametrize("name", OTHER_SLICES)
def test_what_it_was_not_trained_for_is_refused(name, backbone, train_tiny, tmp_path, capsys):
    extra, message = OTHER_SLICES[name]
    assert train_tiny(tmp_path / "run", f"model.weights={backbone}", *FROZEN, *extra) == 2
    shown = capsys.readouterr().err
    assert "model.weights" in shown
    assert message in shown


def test_a_changed_or_missing_bundle_is_refused(backbone, train_tiny, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train_tiny(tmp_path / "one", f"model.weights={tmp_path / 'empty'}") == 2
    assert "no model there" in capsys.readouterr().err
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (backbone / "bundle").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert train_tiny(tmp_path / "two", f"model.weights={copy}") == 2
    assert "not the file that" in capsys.readouterr().err


# the command


def test_labels_only_judge(pretrain, backbone, site, tmp_path, capfd):
    assert pretrain("mocov3", tmp_path / "run", "--labels", str(site.labels)) == 3
    line = metrics(tmp_path / "run")[-1]
    assert {"val_knn", "val_auroc"} <= set(line)
    assert "probe AUROC" in capfd.readouterr().err
    with_labels, without = (
        {row["case_id"]: row["split"] for row in rows(run / "cases.csv")} for run in (tmp_path / "run", backbone)
    )
    assert with_labels.keys() == without.keys()


def test_dry_run_writes_nothing(pretrain, tmp_path, capfd):
    assert pretrain("simclr", tmp_path / "run", "--dry-run", f"data.cache_dir={tmp_path / 'cache'}") == 0
    assert not (tmp_path / "run").exists()
    shown = capfd.readouterr().err
    assert "cases without labels" in shown
    assert "minutes" in shown
    assert "no run was written" in shown.splitlines()[-1]


def test_who_is_in_the_test_split_takes_no_part(pretrain, site, tmp_path):
    table = rows(site.labels)
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*table[0], "split"])
        writer.writeheader()
        writer.writerows({**row, "split": ("train", "test", "train")[n % 3]} for n, row in enumerate(table))
    run = tmp_path / "run"
    assert pretrain("simclr", run, "--labels", str(tmp_path / "labels.csv"), "training.stages.0.epochs=1") == 3
    sides = [row["split"] for row in rows(run / "cases.csv")]
    assert 0 < sides.count("test") <= len(table[1::3])  # some rows are of scans that were set aside
    assert int(open_bundle(run)[1].provenance["cases"]) == sides.count("train")


def test_an_interrupted_run_goes_on_to_the_same_weights(pretrain, backbone, tmp_path, monkeypatch):
    output = tmp_path / "backbone"
    tell = train.telling

    def interrupted(display):
        def stop(row):
            tell(display)(row)
            raise KeyboardInterrupt

        return stop

    monkeypatch.setattr(train, "telling", interrupted)
    assert pretrain("mocov3", output) == 130
    assert len(metrics(output)) == 1
    monkeypatch.setattr(train, "telling", tell)
    assert pretrain("mocov3", output, "--resume") == 3
    whole, resumed = (load_file(run / "bundle" / "model.safetensors") for run in (backbone, output))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert [line["epoch"] for line in metrics(output)] == [1, 2]


WRONG = {
    "one view": (["data.views.count=1"], "data.views.count=2"),
    "select": (["training.select=best"], "keeps the last epoch"),
    "folds": (["data.folds=3"], "one split"),
    "tuning": (["model.tuning=lora"], "model.tuning=full"),
    "frozen": (["training.stages.0.trainable=head"], "trainable=all"),
    "alone": (["training.batch_size=2"], "batch_size must be 3"),
    "small crops": (["data.views.local=2"], "no use for small crops"),
    "larger patches": (
        [
            "--config",
            "pretrain_mae",
            "objective.acceleration={schedule: [{from_progress: 0, patch: 16}, {from_progress: 0.5}]}",
        ],
        "patches of one size",
    ),
    "balanced": (["data.sampling=balanced"], "data.sampling=shuffle"),
    "average": (["--config", "pretrain_dino", "training.ema=0.99"], "training.ema=0"),
    "compiled": (["--config", "pretrain_mae", "training.compile=true"], "training.compile=false"),
    "patch": (["--config", "pretrain_dino", "data.views.local_size=20"], "no multiple of the model's patch"),
    "sweep": (["--sweep", "rates"], "--sweep"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_end_with_2(name, pretrain, tmp_path, capsys):
    extra, message = WRONG[name]
    assert pretrain("simclr", tmp_path / "run", *extra) == 2
    assert message in capsys.readouterr().err


def test_a_backbone_is_a_candidate_of_medvit_rank(backbone, site, capsys):
    settings = [one for one in TINY if not one.startswith(("model.weights", "training"))]
    words = [str(site.folder), "--labels", str(site.labels), "--json", "--weights", str(backbone)]
    assert rank.main([*words, *settings]) == 3
    standings = json.loads(capsys.readouterr().out)["standings"]
    assert {str(backbone), "none"} == {one["weights"] for one in standings}
