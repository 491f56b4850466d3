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
from pretraining_run import Descent, Job, small_vit
from pretraining_sets import Ints, Pictures

from medvit.config import ObjectiveConfig, Stage
from medvit.evaluation.bootstrap import PatientBootstrap, Statistic
from medvit.evaluation.metrics import Floats, weighted_auroc
from medvit.models.classifier import CtClassifier
from medvit.objectives import Task, build_objective

STEPS, BATCH = 400, 32
RATE = 3e-3

LABELLED: Mapping[str, int] = {"phantom": 40, "ct_ich": 16}
"""Set -> patients with labels; digits are no CT."""

Row = Mapping[str, Any]


def score_few(state: Mapping[str, Any], pictures: Pictures, job: Job) -> list[list[float]]:
    """Fine-tune a backbone on each draw of a job: probabilities of the judged slices, a list for each draw."""
    scores = []
    for number in range(job.draws):
        chosen = labelled(pictures, LABELLED[job.cases], [job.seed, number])
        tuned = tune(state, pictures, chosen, job.seed)
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
    objective = build_objective(classifier, ObjectiveConfig(name="supervised"), task)
    descent = Descent(objective, Stage(lr=RATE, backbone_lr=RATE / 2, warmup=0.1), STEPS, seed)
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
        descent.take(step, batch)
    return classifier


def score(classifier: CtClassifier, pictures: Pictures) -> npt.NDArray[np.float32]:
    """Probability of a finding in each judged slice."""
    asked = pictures.plain()[torch.from_numpy(~pictures.learned)]
    with torch.inference_mode():
        mask = torch.ones(512, 1, dtype=torch.bool)
        logits = [classifier.eval()(some[:, None], mask[: len(some)]).logits for some in asked.split(512)]
    return np.asarray(torch.cat(logits).softmax(dim=1)[:, 1].numpy())


def gains(name: str, rows: Mapping[str, Sequence[Row]], comparisons: int) -> dict[str, Any]:
    """A table: AUROC with few labels, and the paired gain over random weights, means over draws.

    Patients who are judged and draws of labelled ones are both resampled: a gain should not hang on either.

    Args:
        name: of the set.
        rows: what was fine-tuned -> its rows, one for each seed; `random` among them, whose rows have `patients` and
            `labels` of the judged slices.
        comparisons: that are made in all; intervals of gains hold for all of them together (Bonferroni).
    """
    patients, labels = np.array(rows["random"][0]["patients"]), np.array(rows["random"][0]["labels"]).astype(bool)
    assert all(row["patients"] == patients.tolist() for row in rows["random"])
    scores = {what: np.array([one for row in some for one in row["few"]]) for what, some in rows.items()}
    alone = {what: [auroc_of(labels, one) for one in some] for what, some in scores.items()}
    single = PatientBootstrap(patients.astype(str))
    together = PatientBootstrap(patients.astype(str), draws=10_000, confidence=1 - 0.05 / comparisons)
    print(f"\n{name}: {LABELLED[name]} labelled patients, {len(scores['random'])} draws\n")
    print(f"| weights | AUROC | gain, for all {comparisons} | draws with a gain |\n|---|---|---|---|")
    print(f"| random | {single.interval(over_draws(labels, [scores['random']]))} | | |")
    found = {}
    for what in [name for name in scores if name != "random"]:
        own = single.interval(over_draws(labels, [scores[what]]))
        gain = together.interval(over_draws(labels, [scores[what], scores["random"]]))
        better = sum(one > other for one, other in zip(alone[what], alone["random"], strict=True))
        print(f"| {what} | {own} | {gain.point:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] | {better} |")
        found[what] = {"auroc": own.point, "gain": gain.point, "low": gain.low, "high": gain.high, "better": better}
    return found


def auroc_of(labels: npt.NDArray[np.bool_], scores: Floats) -> float:
    """Of all judged slices, in one draw of labelled patients."""
    return float(weighted_auroc(labels, scores, np.ones((1, len(labels))))[0])


def over_draws(labels: npt.NDArray[np.bool_], scores: Sequence[Floats]) -> Statistic:
    """Mean over draws of the AUROC of the first scores (draws, n), less that of the second where there are two.

    In resamples draws are drawn with replacement too.
    """
    rng, count = np.random.default_rng(1), len(scores[0])

    def statistic(weights: Floats) -> Floats:
        first, *second = (np.stack([weighted_auroc(labels, one, weights) for one in some]) for some in scores)
        each = first - second[0] if second else first  # (draws, D)
        everyone = len(weights) == 1 and bool((weights == 1).all())
        drawn = np.ones((count, 1)) if everyone else rng.multinomial(count, [1 / count] * count, len(weights)).T
        return np.asarray((drawn * each).sum(axis=0) / count)

    return statistic
