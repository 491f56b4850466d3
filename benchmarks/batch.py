"""What a night costs: medvit-predict against the loop that one would write, and whether its cost stays flat.

    python benchmarks/batch.py [--quick] [--only throughput bound scaling]

throughput: studies a minute of `predict_folder`, with reports and pictures and without, of a loop on MONAI's reader and
one on medvit's, all with the same model on the same phantoms, in alternation. bound: the same with a ViT-S, against the
time that its model alone takes. scaling: seconds and peak memory for twenty times as many small series, each in a
process of its own, the few before and after the many. Goals are those of the design: 1.6 times the loop where the model
takes under 20 % of it, 0.9 of the bound, flat within 10 %, 1 KiB of memory a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from ct_export import write_export
from goals import Goal
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Resize

from medvit import io
from medvit.config import ModelConfig
from medvit.data.pipelines import choose_slices
from medvit.deployment import BatchOptions, predict_folder
from medvit.deployment.choice import list_studies
from medvit.deployment.work import judge, prepare
from medvit.inference import Encoder, Model
from medvit.io import phantom
from medvit.models.bundle_info import BundleInfo
from medvit.models.classifier import build_classifier
from medvit.records import Preprocessing

SMALL = ModelConfig(
    name="vit_tiny_patch16_224",
    weights="none",
    options={"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 8},
)
VIT_S = ModelConfig(name="vit_small_patch16_224", weights="none")


def make_model(architecture: ModelConfig, size: int) -> Model:
    """Random weights: what they are costs no time."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(size=size)
    channels = len(preprocessing.windows)
    classifier, _ = build_classifier(architecture, size=size, channels=channels, classes=2)
    mean = std = (0.5,) * channels
    info = BundleInfo(
        architecture=architecture,
        preprocessing=preprocessing,
        mean=mean,
        std=std,
        classes=("0", "1"),
        threshold=0.5,
        weights_sha256="0" * 64,
    )
    return Model(Encoder(classifier, preprocessing, mean, std), info)


def write_folder(folder: Path, series: int, matrix: int, slices: int) -> list[Path]:
    """Phantoms without faults; the folder of each series."""
    patients = phantom.make_patients(series, 1)
    phantom.write_hospital(folder, patients, faults=False, matrix=matrix, slices=slices)
    return [folder / Path(one.files[0]).parent for one in io.scan_folder(folder).series]


# ---- contenders ------------------------------------------------------------------------------------------------------


def monai_loop(folders: list[Path], model: Model) -> float:
    """Read with MONAI, its transforms, the model, one after the other; returns the share of the model's seconds."""
    size = model.preprocessing.size
    load = Compose(
        [
            LoadImage(reader="PydicomReader", image_only=True),
            EnsureChannelFirst(),
            Orientation(axcodes="LPS", labels=None),
            Resize((size, size, -1)),
        ]
    )
    began, within = time.perf_counter(), 0.0
    for folder in folders:
        image = load(folder)[0].permute(2, 1, 0)  # (Z, Y, X)
        hu = image[choose_slices(len(image), model.preprocessing.predict_slices)].numpy()
        start = time.perf_counter()
        model.encoder.studies([model.encoder.encode(np.round(hu).astype(np.int16))])
        within += time.perf_counter() - start
    return within / (time.perf_counter() - began)


def medvit_loop(folders: list[Path], model: Model) -> None:
    """The same on medvit's reader."""
    for folder in folders:
        model.predict([io.read(folder)])


def batch(folder: Path, model: Model, output: Path, *, dicom: bool) -> None:
    """What medvit-predict does."""
    shutil.rmtree(output, ignore_errors=True)
    done = predict_folder(folder, model, output, BatchOptions(dicom=dicom))
    assert not done.waiting
    assert not done.failed


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, another first each time; a round before them does not count."""
    names, seconds = list(contenders), {name: list[float]() for name in contenders}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# ---- parts -----------------------------------------------------------------------------------------------------------


def throughput(scratch: Path, *, quick: bool) -> list[Goal]:
    """A small model: reading decides."""
    series, rounds = (16, 3) if quick else (40, 7)
    folders = write_folder(scratch / "in", series, matrix=256, slices=48)
    model = make_model(SMALL, 64)
    share = [monai_loop(folders, model) for _ in range(2)][-1]
    contenders: dict[str, Callable[[], object]] = {
        "loop, MONAI's reader": lambda: monai_loop(folders, model),
        "loop, medvit's reader": lambda: medvit_loop(folders, model),
        "medvit-predict": lambda: batch(scratch / "in", model, scratch / "out", dicom=True),
        "medvit-predict --no-dicom": lambda: batch(scratch / "in", model, scratch / "out", dicom=False),
    }
    seconds = alternate(contenders, rounds)
    show(seconds, series)
    loop, whole = np.array(seconds["loop, MONAI's reader"]), np.array(seconds["medvit-predict"])
    own, bare = np.array(seconds["loop, medvit's reader"]), np.array(seconds["medvit-predict --no-dicom"])
    return [
        Goal("share of the model in the loop", share, 0.0, 0.2),
        Goal("studies a minute over the loop on MONAI's reader", float(np.median(loop / bare)), 1.6, np.inf),
        Goal("the same, with a report and a picture of each (no goal)", float(np.median(loop / whole)), 0.0, np.inf),
        Goal("over the loop on medvit's reader (no goal)", float(np.median(own / bare)), 0.0, np.inf),
        Goal("share of reports and pictures in the time (no goal)", float(np.median(1 - bare / whole)), 0.0, np.inf),
    ]


def bound(scratch: Path, *, quick: bool) -> list[Goal]:
    """A ViT-S at 224 px: the model decides."""
    series, rounds = (3, 1) if quick else (6, 3)
    write_folder(scratch / "in", series, matrix=256, slices=48)
    model = make_model(VIT_S, 224)
    options = BatchOptions()
    listed = list_studies(io.scan_folder(scratch / "in"), options.wanted, options.study).listed
    prepared = [prepare(one, model) for one in listed]
    contenders: dict[str, Callable[[], object]] = {
        "the model alone": lambda: [judge(one, model, draw=False) for one in prepared],
        "the model, and what it looked at": lambda: [judge(one, model, draw=True) for one in prepared],
        "medvit-predict --no-dicom": lambda: batch(scratch / "in", model, scratch / "out", dicom=False),
        "medvit-predict": lambda: batch(scratch / "in", model, scratch / "out", dicom=True),
    }
    seconds = alternate(contenders, rounds)
    show(seconds, series)
    alone, seen, bare, whole = (np.array(values) for values in seconds.values())
    return [
        Goal("of the compute bound, without reports", float(np.median(alone / bare)), 0.9, np.inf),
        Goal("of the compute bound, with reports and pictures", float(np.median(seen / whole)), 0.9, np.inf),
        Goal("of the model alone, with reports and pictures (no goal)", float(np.median(alone / whole)), 0.0, np.inf),
    ]


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from batch import SMALL, batch, make_model
model = make_model(SMALL, 64)
def resident(which):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024
before, start = resident("VmRSS"), time.perf_counter()
batch(Path(sys.argv[1]), model, Path(sys.argv[2]), dicom=sys.argv[4] == "dicom")
print(time.perf_counter() - start, resident("VmHWM") - before)
"""


def scaling(scratch: Path, *, quick: bool) -> list[Goal]:
    """Small series, few and many; the few before and after the many, since a machine's speed drifts in such a time."""
    few, many = (200, 1_000) if quick else (1_000, 20_000)
    slices, cost, memory = 4, dict[int, list[float]](), dict[int, list[float]]()
    for series in (few, many):
        write_export(scratch / str(series), series * slices, slices, per_study=1)
    for number, series in enumerate((few,) * 3 + (many,) + (few,) * 3):
        os.sync()  # what was written before is not to be paid for by who comes next
        output = scratch / f"out{number}"
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(scratch / str(series)), str(output)]
        command += [str(Path(__file__).parent), "dicom"]
        seconds, more = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        shutil.rmtree(output)
        cost.setdefault(series, []).append(seconds / series)
        memory.setdefault(series, []).append(more)
        each = 1000 * seconds / series
        print(f"{series:6} series {each:8.1f} ms each, {more / 1e6:6.0f} MB more at the peak", flush=True)
    per_file = (memory[many][0] - float(np.mean(memory[few]))) / ((many - few) * slices)
    return [
        Goal(f"cost of a series, {many} over {few}", cost[many][0] / float(np.mean(cost[few])), 0.0, 1.1),
        Goal("bytes of memory a file", per_file, 0.0, 1024),
    ]


def show(seconds: Mapping[str, list[float]], series: int) -> None:
    """Studies a minute."""
    for name, values in seconds.items():
        low, middle, high = np.quantile(60 * series / np.array(values), (0.25, 0.5, 0.75))
        print(f"{name:36}{middle:8.0f} studies a minute ({low:.0f} to {high:.0f})")


PARTS = {"throughput": throughput, "bound": bound, "scaling": scaling}


def main() -> None:
    """Run the parts, print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under ten minutes: fewer series, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    goals: list[Goal] = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as scratch:
            goals += PARTS[name](Path(scratch), quick=arguments.quick)
    for goal in goals:
        wanted = f"at least {goal.low:g}" if goal.high == np.inf else f"at most {goal.high:g}"
        print(f"{goal.what:64}{goal.figure:10.3f}   {wanted}{'' if goal.met else '   MISSED'}")
    result = {
        "name": "batch",
        "figure": sum(goal.met for goal in goals),
        "unit": "goals met",
        "goal": len(goals),
        "met": all(goal.met for goal in goals),
        "detail": [asdict(goal) | {"high": min(goal.high, 1e9), "met": goal.met} for goal in goals],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
