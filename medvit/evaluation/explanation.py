"""What the model looked at: relevance maps of held-out cases, how far they can be believed, and pictures of a few.

Maps are judged before they are shown (`medvit.evaluation.faithfulness`): one that does no better than pointing at the
middle explains nothing, however convincing it looks. With two classes the presence of the finding is explained, also
where it was missed: its absence is nowhere in particular.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from medvit.config import AttentionConfig
from medvit.evaluation.attention import Floats, relevance_maps
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.explained import Explanation, Picture
from medvit.evaluation.faithfulness import Areas, centre_map, deletion_insertion, random_map, summarise
from medvit.evaluation.overlays import draw_overlay
from medvit.inference import Judged
from medvit.models.attention import watchable

RANDOM_ORDERS = 2
FEWEST = 3
"""Patients below which nothing is said about maps."""


def explain(
    judged: Sequence[Judged], settings: AttentionConfig, step: Callable[[str], None] = lambda _: None
) -> Explanation:
    """Judge maps on cases that were called, within the caps of `settings`, and draw a few.

    Args:
        judged: held-out cases.
        settings: caps.
        step: called after each case.
    """
    if not judged or not all(watchable(one.model.encoder.classifier.backbone) for one in judged):
        return Explanation(note="The model has no attention over all patches that could be looked at.")
    began = time.monotonic()
    called = [one for one in judged if _target(one) == one.prediction.predicted]
    order = np.random.default_rng(settings.seed).permutation(len(called))[: settings.cases]
    found: dict[str, list[Areas]] = {}
    done: list[Judged] = []
    for number in order:
        if time.monotonic() - began > 60 * settings.minutes:
            break
        done.append(called[number])
        for name, areas in _areas(called[number], settings).items():
            found.setdefault(name, []).append(areas)
        step("")
    seconds = time.monotonic() - began
    pictures = tuple(_picture(one, kind) for kind, one in _worth_seeing(judged, settings.pictures))
    bootstrap = PatientBootstrap(np.array([one.case.patient_id for one in done]))
    enough = len({one.case.patient_id for one in done}) >= FEWEST
    random = [found.pop(f"random {k}", []) for k in range(RANDOM_ORDERS)]
    return Explanation(
        maps=summarise(found, random, bootstrap) if enough else {},
        cases=len(done),
        available=len(called),
        slices=settings.slices,
        seconds=seconds,
        pictures=pictures,
        note="" if enough else f"Maps were not judged: fewer than {FEWEST} patients were called within the time cap.",
    )


def _target(one: Judged) -> str:
    """The class that is explained: the finding of two classes, else what was called."""
    names = list(one.prediction.probabilities)
    return names[1] if len(names) == 2 else one.prediction.predicted


def _decisive(one: Judged, count: int) -> list[int]:
    """Places of the slices that counted most, most first, among those looked at."""
    weights = [weight for _, weight in one.prediction.slice_weights]
    return [int(place) for place in np.argsort(-np.array(weights), kind="stable")[:count]]


def _maps(one: Judged, at: Sequence[int]) -> dict[str, Floats]:
    target = list(one.prediction.probabilities).index(_target(one))
    return {str(name): found for name, found in relevance_maps(one.model.encoder, one.slices, target, at).items()}


def _areas(one: Judged, settings: AttentionConfig) -> dict[str, Areas]:
    at = _decisive(one, settings.slices)
    maps = _maps(one, at)
    shape = next(iter(maps.values())).shape
    rivals = {f"random {k}": random_map(shape, settings.seed, k) for k in range(RANDOM_ORDERS)}
    target = list(one.prediction.probabilities).index(_target(one))
    everything = maps | rivals | {"centre": centre_map(shape)}
    return deletion_insertion(one.model.encoder, one.slices, target, at, everything)


def _worth_seeing(judged: Sequence[Judged], count: int) -> list[tuple[str, Judged]]:
    """Where the model was most sure, right and wrong: as many of each kind as fit into `count`."""
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        if kind := _kind(one):
            kinds.setdefault(kind, []).append(one)

    def surest(one: Judged) -> float:
        return -max(one.prediction.probabilities.values())

    each = max(1, count // max(1, len(kinds)))
    chosen = [(kind, one) for kind in sorted(kinds, reverse=True) for one in sorted(kinds[kind], key=surest)[:each]]
    return chosen[:count]


def _kind(one: Judged) -> str:
    if len(one.prediction.probabilities) > 2:
        return "right call" if one.right else "wrong call"
    if _target(one) == one.prediction.predicted:
        return "right call" if one.right else "false alarm"
    return "" if one.right else "missed"


def _picture(one: Judged, kind: str) -> Picture:
    (place,) = _decisive(one, 1)
    number, weight = one.prediction.slice_weights[place]
    relevance = _maps(one, [place])["gradient"][0]
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
