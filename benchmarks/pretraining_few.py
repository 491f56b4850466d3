"""Few labelled patients: fine-tuning what was pretrained on unlabelled others, against random weights.

Each draw takes other labelled patients; what is fine-tuned was pretrained with the seed of the draw. Who is judged
stays the same, and is seen by neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pretraining_run import small_vit
from pretraining_sets import Ints, Pictures

from medvit.config import ObjectiveConfig, Stage
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Interval, weighted_auroc
from medvit.models.classifier import CtClassifier
from medvit.objectives import Task, build_objective
from medvit.training.optimizer import course, parameter_groups

STEPS, BATCH = 400, 32
RATE = 3e-3

LABELLED: Mapping[str, int] = {"phantom": 40, "ct_ich": 16}
"""Set -> patients with labels; digits are no CT."""

DRAWS = 2
"""Of labelled patients, for each seed of pretraining."""

Row = Mapping[str, Any]


def score_few(state: Mapping[str, Any], pictures: Pictures, patients: int, seed: int) -> list[list[float]]:
    """Fine-tune a backbone on each draw of a seed: probabilities of the judged slices, a list for each draw."""
    scores = []
    for number in range(DRAWS):
        chosen = labelled(pictures, patients, [seed, number])
        tuned = tune(state, pictures, chosen, seed)
        scores.append([round(float(one), 5) for one in score(tuned, pictures)])
    return scores


def labelled(pictures: Pictures, count: int, seed: Sequence[int]) -> Ints:
    """Slices of so many patients that may be learned from, half of them with a positive slice."""
    rng = np.random.default_rng([*seed, 5])
    people = np.unique(pictures.patients[pictures.learned])
    positive = np.array([pictures.labels[pictures.patients == one].any() for one in people])
    drawn = [rng.permutation(people[positive == kind])[: count // 2] for kind in (True, False)]
    return np.flatnonzero(pictures.learned & np.isin(pictures.patients, np.concatenate(drawn)))


def tune(state: Mapping[str, Any], pictures: Pictures, chosen: Ints, seed: int) -> CtClassifier:
    """Fine-tune all weights on views of the chosen slices."""
    classifier = small_vit(pictures, seed)
    classifier.backbone.load_state_dict(state)
    labels = pictures.labels[chosen]
    task = Task(tuple(np.bincount(labels, minlength=2).tolist()))
    objective = build_objective(classifier, ObjectiveConfig(name="supervised"), task).train()
    objective.set_trainable("all", 1)
    stage = Stage(lr=RATE, backbone_lr=RATE / 2, warmup=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(objective, stage), fused=True)
    factor, peaks = course(stage, STEPS), [group["lr"] for group in optimizer.param_groups]
    rng, places = np.random.default_rng([seed, 6]), np.searchsorted(np.flatnonzero(pictures.learned), chosen)
    views = torch.cat([pictures.views(epoch)[places] for epoch in range(2)], dim=1)  # (M, 4, C, H, W)
    for step in range(STEPS):
        picked = rng.integers(0, len(chosen), BATCH)
        batch = {
            "input": views[picked, step % views.shape[1]][:, None].float(),
            "mask": torch.ones(BATCH, 1, dtype=torch.bool),
            "label": torch.from_numpy(labels[picked]),
            "domain": torch.zeros(BATCH, dtype=torch.int64),
            "index": torch.arange(BATCH),
        }
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        objective({**batch, "totals": objective.totals(batch)}, step / STEPS)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return classifier


def score(classifier: CtClassifier, pictures: Pictures) -> npt.NDArray[np.float32]:
    """Probability of a finding in each judged slice."""
    asked = pictures.plain()[torch.from_numpy(~pictures.learned)]
    with torch.inference_mode():
        mask = torch.ones(512, 1, dtype=torch.bool)
        logits = [classifier.eval()(some[:, None], mask[: len(some)]).logits for some in asked.split(512)]
    return np.asarray(torch.cat(logits).softmax(dim=1)[:, 1].numpy())


def gains(name: str, pictures: Row, rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """A table: AUROC with few labels, and the paired gain over random weights; means over draws, patients resampled.

    Args:
        name: of the set.
        pictures: `patients` and `labels` of the judged slices.
        rows: what was fine-tuned -> its rows, one for each seed; `random` among them.
    """
    patients, labels = np.array(pictures["patients"]), np.array(pictures["labels"]).astype(bool)
    bootstrap = PatientBootstrap(patients.astype(str))
    scores = {what: np.array([one for row in some for one in row["few"]]) for what, some in rows.items()}

    def auroc(what: str, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(np.mean([weighted_auroc(labels, one, weights) for one in scores[what]], axis=0))

    def interval(what: str, less: str | None = None) -> Interval:
        return bootstrap.interval(lambda weights: auroc(what, weights) - (0 if less is None else auroc(less, weights)))

    print(f"\n{name}: {LABELLED[name]} labelled patients, {len(scores['random'])} draws\n")
    print("| weights | AUROC | gain over random weights | by draw |\n|---|---|---|---|")
    found = {}
    for what, some in scores.items():
        own, gain = interval(what), interval(what, "random")
        each = ", ".join(f"{float(weighted_auroc(labels, one, np.ones((1, len(labels))))[0]):.2f}" for one in some)
        shown = "" if what == "random" else f"{gain.point:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        print(f"| {what} | {own} | {shown} | {each} |")
        found[what] = {"auroc": own.point, "gain": gain.point, "low": gain.low, "high": gain.high}
    return found
