"""What a training step keeps in memory and how long it takes: freezing, gradient checkpointing, fused attention.

    python benchmarks/memory.py [--quick] [--slices 4]

Two ViT-S with random weights (16-px patches at 224 px, 14-px patches at 126 px), one study per step. Bytes are exact:
every tensor that autograd keeps from the forward pass, each storage once, parameters and buffers not counted. Times are
processor seconds of one thread, so that other work on the machine matters little, for forward and backward pass; all
arms in each round, another first each time; ratios are medians within rounds. Then bf16 where the processor has units
for it, and torch.compile of the backbone in a process of its own, given three minutes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medvit.config import ModelConfig
from medvit.models.classifier import CtClassifier, build_classifier

MODELS = {"ViT-S/16, 224 px": ("vit_small_patch16_224", 224), "ViT-S/14, 126 px": ("vit_small_patch14_dinov2", 126)}
GOAL = 0.15
"""Of the activations of full training, with gradient checkpointing, on the first model."""

COMPILE_SECONDS = 180


class Arm(NamedTuple):
    """One way to take a training step."""

    trainable: str
    checkpointing: bool = False
    fused: bool = True
    precision: str = "fp32"


FULL, CHECKPOINTED = Arm("all"), Arm("all", checkpointing=True)
ARMS = [
    Arm("head"),
    Arm("head", fused=False),
    *(Arm(trainable, on, fused) for trainable in ("top", "all") for on in (False, True) for fused in (True, False)),
]


class Kept:
    """What autograd keeps of one tensor: dead as soon as autograd lets go of it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps for its backward pass: each storage once, without the model's own tensors."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(value: Tensor) -> Kept:
        alive.add(kept := Kept(value.detach()))  # an output would hold its own graph for ever
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.value):
        loss = forward()
    storages = {kept.value.untyped_storage().data_ptr(): kept.value.untyped_storage() for kept in alive}
    del loss
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def check_counting() -> None:
    """The counter on a case that can be done by hand: the input of a layer, and what goes into its GELU."""
    layer = nn.Sequential(nn.Linear(16, 32), nn.GELU())
    counted, by_hand = kept_bytes(layer, lambda: layer(torch.zeros(8, 16)).sum()), 8 * 16 * 4 + 8 * 32 * 4
    if counted != by_hand:
        raise SystemExit(f"bytes are miscounted: {counted} instead of {by_hand}")


def build(name: str, size: int) -> CtClassifier:
    """A classifier of two classes with random weights."""
    torch.manual_seed(0)
    return build_classifier(ModelConfig(name=name, weights="none"), size=size, channels=3, classes=2)[0].train()


def prepare(classifier: CtClassifier, arm: Arm) -> None:
    """Make the classifier train as the arm says."""
    classifier.set_trainable(arm.trainable, 3)  # type: ignore[arg-type]
    classifier.set_gradient_checkpointing(arm.checkpointing)
    for module in classifier.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = arm.fused
    if classifier.backbone.fused_attention() != arm.fused:
        raise SystemExit("the attention is not what this arm is about")


def loss_of(classifier: CtClassifier, slices: Tensor, arm: Arm) -> Tensor:
    """Cross-entropy of one study (1, S, C, H, W)."""
    mask = torch.ones(slices.shape[:2], dtype=torch.bool)
    mixed = torch.autocast("cpu", torch.bfloat16) if arm.precision == "bf16" else nullcontext()
    with mixed:
        return nn.functional.cross_entropy(classifier(slices, mask).logits.float(), torch.tensor([1]))


def seconds_of_step(classifier: CtClassifier, slices: Tensor, arm: Arm) -> float:
    """Processor seconds of forward and backward pass."""
    prepare(classifier, arm)
    start = time.process_time()
    loss_of(classifier, slices, arm).backward()
    took = time.process_time() - start
    classifier.zero_grad()
    return took


def measure(name: str, size: int, slices: int, rounds: int, arms: list[Arm]) -> tuple[dict[Arm, int], dict[Arm, Any]]:
    """Bytes kept, and seconds (rounds,), of each arm on one model."""
    classifier = build(name, size)
    study = torch.randn(1, slices, 3, size, size)
    kept = {}
    for arm in arms:
        prepare(classifier, arm)
        kept[arm] = kept_bytes(classifier, lambda arm=arm: loss_of(classifier, study, arm))
        seconds_of_step(classifier, study, arm)  # warm
    seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            seconds[arm].append(seconds_of_step(classifier, study, arm))
    return kept, {arm: np.array(values) for arm, values in seconds.items()}


def show(title: str, kept: dict[Arm, int], seconds: dict[Arm, Any]) -> list[dict[str, Any]]:
    """Print a table in Markdown; the rows as records."""
    print(
        f"\n{title}\n\n| trained | checkpointing | attention | precision | MiB kept | share | s a step | times full |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for arm, held in kept.items():
        low, middle, high = np.percentile(seconds[arm], [25, 50, 75])
        row = {
            **arm._asdict(),
            "mib": round(held / 2**20, 2),
            "share": round(held / kept[FULL], 4),
            "seconds": round(float(middle), 4),
            "times_full": round(float(np.median(seconds[arm] / seconds[FULL])), 3),
        }
        words = ("yes" if arm.checkpointing else "no", "fused" if arm.fused else "not fused", arm.precision)
        figures = f"{row['mib']:.1f} | {row['share']:.3f} | {middle:.3f} ({low:.3f} to {high:.3f})"
        print(f"| {arm.trainable} | {' | '.join(words)} | {figures} | {row['times_full']:.2f} |", flush=True)
        rows.append(row)
    return rows


def compiled(slices: int) -> str:
    """What torch.compile does to the smaller model, in words; nothing is taken from an earlier compilation."""
    command = [sys.executable, __file__, "--compiled", "--slices", str(slices)]
    afresh = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True, env=afresh)
    except subprocess.TimeoutExpired:
        return f"not within {COMPILE_SECONDS} s"
    except subprocess.CalledProcessError as error:
        return f"failed: {error.stderr.strip().splitlines()[-1][:160]}"
    return done.stdout.strip().splitlines()[-1]


def compile_here(slices: int, rounds: int = 5) -> None:
    """One arm with and without a compiled backbone, in alternation."""
    name, size = MODELS["ViT-S/14, 126 px"]
    plain, faster, study = build(name, size), build(name, size), torch.randn(1, slices, 3, size, size)
    faster.backbone.compile()  # not the whole: which slices are real is known only when it runs
    began = time.perf_counter()
    seconds_of_step(faster, study, FULL)
    first = time.perf_counter() - began
    seconds_of_step(plain, study, FULL)
    pairs = [(seconds_of_step(plain, study, FULL), seconds_of_step(faster, study, FULL)) for _ in range(rounds)]
    before, after = np.median(pairs, axis=0)
    ratio = np.median([fast / slow for slow, fast in pairs])
    print(f"first step {first:.0f} s, then {after:.3f} s against {before:.3f} s: {ratio:.2f} times")


def main() -> None:
    """Print the tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=4, help="of the study in each step")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.compiled:
        compile_here(arguments.slices)
        return
    check_counting()
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    arms = ARMS + [arm._replace(precision="bf16") for arm in (FULL, CHECKPOINTED) if has_bf16]
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}")
    print(
        f"load before the start {load:.1f}; {arguments.slices} slices a step; bf16 units: {'yes' if has_bf16 else 'no'}"
    )
    tables = {}
    for title, (name, size) in MODELS.items():
        kept, seconds = measure(name, size, arguments.slices, 3 if arguments.quick else 9, arms)
        tables[title] = show(title, kept, seconds)
    share, cost = (
        next(row[key] for row in tables["ViT-S/16, 224 px"] if Arm(*list(row.values())[:4]) == CHECKPOINTED)
        for key in ("share", "times_full")
    )
    told = compiled(arguments.slices)
    print(f"\ntorch.compile, ViT-S/14 at 126 px, all trained: {told}")
    print(f"checkpointing keeps {share:.3f} of full training (at most {GOAL}) and takes {cost:.2f} times as long")
    detail = {"step_times_full": cost, "load": load, "compile": told, "tables": tables}
    result = {"name": "memory", "figure": share, "unit": "share of activations kept", "goal": GOAL}
    print(json.dumps(result | {"met": share <= GOAL, "detail": detail}))


if __name__ == "__main__":
    main()
