"""What the model looked at: relevance maps of held-out cases, how far they can be believed, and pictures of a few.

Maps are judged before they are shown (`medvit.evaluation.faithfulness`): one that does no better than pointing at the
middle explains nothing, however convincing it looks. With two classes the presence of the finding is explained, also
where it was missed: its absence is nowhere in particular.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from medvit.config import AttentionConfig, EvaluationConfig
from medvit.evaluation.attention import Floats, relevance_maps
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.explained import PREFERRED, Explanation, Picture
from medvit.evaluation.faithfulness import Areas, centre_map, deletion_insertion, random_map, summarise
from medvit.evaluation.overlays import draw_overlay
from medvit.inference import Judged
from medvit.models.watching import watchable
from medvit.records import UsageError

FEWEST = 6
"""Patients below which nothing is said about maps: with three, one in twenty beats both rivals by chance."""


def explain(
    judged: Sequence[Judged], settings: EvaluationConfig, step: Callable[[str], None] = lambda _: None
) -> Explanation:
    """Judge maps on cases that were called, within the caps of `settings`, and draw a few.

    Args:
        judged: held-out cases.
        settings: caps (`attention`), draws and confidence.
        step: called after each case.

    Raises:
        UsageError: `evaluation.attention` is null.
    """
    if (limits := settings.attention) is None:
        raise UsageError("evaluation.attention is null: give its settings, or do not look into the model.")
    if not judged or not all(watchable(one.model.encoder.classifier.backbone) for one in judged):
        return Explanation(note="The model has no attention over all patches that could be looked at.")
    began = time.monotonic()
    called = [one for one in judged if _target(one) == one.prediction.predicted]
    order = np.random.default_rng(limits.seed).permutation(len(called))[: limits.cases]
    found: dict[str, list[Areas]] = {}
    done: list[Judged] = []
    for number in order:
        if time.monotonic() - began > 60 * limits.minutes:
            break
        done.append(called[number])
        for name, areas in _areas(called[number], limits).items():
            found.setdefault(name, []).append(areas)
        step("")
    patients = np.array([one.case.patient_id for one in done])
    enough = len(np.unique(patients)) >= FEWEST
    explanation = Explanation(
        maps=summarise(found, PatientBootstrap(patients, settings.bootstrap, settings.confidence)) if enough else {},
        cases=len(done),
        available=len(called),
        slices=limits.slices,
        seconds=time.monotonic() - began,
        note="" if enough else f"Maps were not judged: fewer than {FEWEST} patients were called within the time cap.",
    )
    chosen = _worth_seeing(judged, limits.pictures)
    return replace(explanation, pictures=tuple(_picture(one, kind, explanation.shown) for kind, one in chosen))


def _target(one: Judged) -> str:
    """The class that is explained: the finding of two classes, else what was called."""
    names = list(one.prediction.probabilities)
    return names[1] if len(names) == 2 else one.prediction.predicted


def _decisive(one: Judged, count: int) -> list[int]:
    """Places of the slices that counted most, most first, among those looked at."""
    weights = [weight for _, weight in one.prediction.slice_weights]
    return [int(place) for place in np.argsort(-np.array(weights), kind="stable")[:count]]


def _maps(one: Judged, features: Floats, at: Sequence[int]) -> dict[str, Floats]:
    target = list(one.prediction.probabilities).index(_target(one))
    maps = relevance_maps(one.model.encoder, one.slices, features, target, at)
    return {str(name): found for name, found in maps.items()}


def _areas(one: Judged, limits: AttentionConfig) -> dict[str, Areas]:
    at, features = _decisive(one, limits.slices), one.model.encoder.encode(one.slices)
    maps = _maps(one, features, at)
    shape = next(iter(maps.values())).shape
    # another order for each case: the luck of one would not average out
    rivals = {"centre": centre_map(shape), "random": random_map(shape, limits.seed, one.case.case_id)}
    target = list(one.prediction.probabilities).index(_target(one))
    return deletion_insertion(one.model.encoder, one.slices, features, target, at, maps | rivals)


def _worth_seeing(judged: Sequence[Judged], count: int) -> list[tuple[str, Judged]]:
    """Where the model was most sure, right and wrong: as many of each kind as fit into `count`."""
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        if kind := _kind(one):
            kinds.setdefault(kind, []).append(one)

    def surest(one: Judged) -> float:
        share = one.prediction.probabilities[_target(one)]
        return share if _kind(one) == "missed" else -share

    each = max(1, count // max(1, len(kinds)))
    chosen = [(kind, one) for kind in sorted(kinds, reverse=True) for one in sorted(kinds[kind], key=surest)[:each]]
    return chosen[:count]


def _kind(one: Judged) -> str:
    if len(one.prediction.probabilities) > 2:
        return "right call" if one.right else "wrong call"
    if _target(one) == one.prediction.predicted:
        return "right call" if one.right else "false alarm"
    return "" if one.right else "missed"


def _picture(one: Judged, kind: str, shown: str) -> Picture:
    (place,) = _decisive(one, 1)
    number, weight = one.prediction.slice_weights[place]
    relevance = _maps(one, one.model.encoder.encode(one.slices), [place])[shown or PREFERRED[0]][0]
    target = _target(one)
    return Picture(
        case_id=one.case.case_id,
        kind=kind,
        target=target,
        probability=one.prediction.probabilities[target],
        label=str(one.case.label),
        slice_number=number + 1,
        slices=len(one.load(one.case)),
        weight=weight,
        png=draw_overlay(one.slices[place], relevance, one.model.preprocessing.windows),
    )
