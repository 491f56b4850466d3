"""One run of `recipe.py` through medvit's own door: train on some patients, predict others, and tell the seconds."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import kept_bytes
from recipe_contenders import CONTENDERS
from recipe_sets import JUDGE, STEP, Cases, of_patients

from medvit import data, training
from medvit.config import Config
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES, Task
from medvit.training.material import Material

SLICES = Config().preprocessing.train_slices
"""Of a scan in an epoch, at most."""


@dataclass(frozen=True)
class Job:
    """One run: which contender, on which cases, for how long.

    Attributes:
        cases: name of the set.
        contender: name.
        round: which of the set's.
        patients: trained on; 0: all of the round's.
        seconds: to spend.
    """

    cases: str
    contender: str
    round: int
    patients: int
    seconds: float

    def config(self, found: Cases, train: Sequence[int], weights: str) -> Config:
        """The settings of this run."""
        images = sum(min(SLICES, len(found.cases[index].files)) for index in train)
        settings = {
            "model.weights": weights,
            **found.settings,
            "training.threads": 1,
            "training.precision": "32-true",  # what every machine has
            "training.seed": self.round,
        }
        return CONTENDERS[self.contender].resolve(settings, self.seconds, images, found.faster)


def run(job: Job, found: Cases, weights: str) -> dict[str, Any]:
    """Train and predict; returns the job, its processor seconds, and a row per judged case."""
    train, test = found.rounds[job.round]
    if job.patients:
        train = of_patients(found.cases, train, job.patients)
    config = job.config(found, train.tolist(), weights)
    with tempfile.TemporaryDirectory() as scratch:
        # a copy: features of the frozen backbone are kept beside the slices, and no other run shall find them
        shutil.copytree(found.cache, Path(scratch) / "cache")
        slices = data.SliceCache(Path(scratch) / "cache", config.preprocessing)
        learners = [found.cases[index] for index in train]
        began = time.process_time()  # of one thread: others on the machine do not count
        experiment = training.Experiment(config, learners, found.classes, slices, Path(scratch) / "run", JUDGE)
        model = experiment.refit(sum(stage.epochs for stage in config.training.stages))
        trained = time.process_time()
        judged = Material(config, [found.cases[index] for index in test], found.classes, slices)
        predictions = judged.predict(model, np.arange(len(test)))
        ended = time.process_time()
    return {
        **vars(job),
        "trained_s": round(trained - began, 2),
        "predicted_s": round(ended - trained, 2),
        "kept_mb": round(kept_for_backward(config, len(found.classes)), 1),
        "epochs": [stage.epochs for stage in config.training.stages],
        "predictions": [
            [
                one.patient_id,
                one.sex,
                int(one.label == found.classes[-1]),
                round(one.probabilities[found.classes[-1]], 5),
            ]
            for one in predictions
        ],
    }


def kept_for_backward(config: Config, classes: int, batch: int = STEP) -> float:
    """Most megabytes that autograd keeps of a step on a batch of slices, over the stages of training."""
    channels = len(config.preprocessing.windows)
    random = config.model.model_copy(update={"weights": "none"})
    classifier, _ = build_classifier(random, size=config.preprocessing.size, channels=channels, classes=classes)
    objective = OBJECTIVES[config.objective.name](classifier, config.objective, Task((1,) * classes))
    most = 0
    for stage in config.training.stages:
        classifier.set_trainable(stage.trainable, stage.blocks)
        size = classifier.set_size(stage.size or config.preprocessing.size)
        step = {"label": torch.arange(batch) % classes, "domain": torch.zeros(batch), "index": torch.arange(batch)}
        step |= {"input": torch.randn(batch, 1, channels, size, size), "mask": torch.ones(batch, 1, dtype=torch.bool)}
        step["totals"] = objective.totals(step)
        most = max(most, kept_bytes(objective.train(), partial(objective, step, 0.0)))
    return most / 1e6
