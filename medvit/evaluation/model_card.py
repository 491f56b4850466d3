"""The model card: what a model is, what it was made from, how good it is for whom, and what it must not be used for.

Everything a run knows is written by the run; what only a person can say (intended use, who answers for it) is left open
and marked, since a machine's guess there would be worse than nothing. It lies in the bundle and travels with it: as
Markdown for people, as JSON for registries (the sections of the CHAI applied model card and of TRIPOD+AI).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from medvit.evaluation.pages import templates, title
from medvit.evaluation.plain import without_nan
from medvit.evaluation.report import Report
from medvit.records import Case, UsageError

if TYPE_CHECKING:
    from medvit.models.bundle_info import BundleInfo

SCHEMA_VERSION = 1
MARKDOWN, DOCUMENT = "model_card.md", "model_card.json"

TO_FILL = {
    "intended_use": "the clinical question, who acts on the answer, and how",
    "intended_users": "profession and training",
    "patients": "who the model may be used on: age, setting, indication",
    "label_source": "who set the reference standard, how, and how often readers agreed",
    "responsible": "the person who answers for the use of this model, and how to reach them",
    "approval": "regulatory status and ethics approval; without it, research only",
}
"""What a person has to say: field -> what is asked. They are null in the JSON until somebody does."""

OUT_OF_SCOPE = (
    "diagnosis without a person who decides, and wherever the law demands an explanation of each decision: relevance "
    "maps are no explanation in that sense",
    "hard real time: nothing guarantees an answer within a deadline",
    "identifying persons, or inferring sex, age or origin",
    "other modalities, other body parts, and scanners or patients far from the training data without validation there",
    "training of people, triage without follow-up, and screening of those who were not asked",
)
"""Uses that are never intended, whatever a person fills in."""

OLDEST = 90
"""Stands for itself and more: an exact age above identifies (HIPAA safe harbour, 45 CFR 164.514)."""

FIGURES = (
    *("auroc", "auroc_within_folds", "average_precision", "sensitivity", "specificity"),
    *("brier", "ece", "calibration_slope", "calibration_intercept"),
)


def write_model_card(
    folder: Path, info: BundleInfo, cases: Sequence[Case], report: Report, about: Mapping[str, str]
) -> dict[str, Any]:
    """Write model_card.md and model_card.json into a bundle's folder; returns what the JSON holds.

    Args:
        folder: the bundle's.
        info: of the bundle.
        cases: that the run had, labelled or of a target site.
        report: on held-out cases of the same run.
        about: how the run was made, as the report shows it.
    """
    card: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "to_be_filled_by_a_person": TO_FILL,
        **dict.fromkeys(TO_FILL),
        "out_of_scope": list(OUT_OF_SCOPE),
        "model": _model(info),
        "data": _data(cases),
        "training_range": info.training_range.model_dump(mode="json"),
        "preprocessing": info.preprocessing.model_dump(mode="json"),
        "made": dict(about),
        "evaluation": _evaluation(report),
        "warnings": _warnings(report),
    }
    defined: dict[str, Any] = without_nan(card)
    text = json.dumps(defined, indent=2, ensure_ascii=False)
    (folder / DOCUMENT).write_text(text + "\n", encoding="utf-8")
    (folder / MARKDOWN).write_text(_markdown(defined), encoding="utf-8")
    return defined


class _Card(BaseModel):
    """Of a model card, what a report needs."""

    made: dict[str, str]


def read_made(folder: Path) -> dict[str, str]:
    """How the model in a bundle's folder was made, as its card says; nothing where there is no card.

    Raises:
        UsageError: the card can no longer be read.
    """
    path = folder / DOCUMENT
    if not path.is_file():
        return {}
    try:
        return _Card.model_validate_json(path.read_bytes()).made
    except ValidationError:
        raise UsageError(
            f"{path}: no longer the JSON that medvit wrote. Mend what was filled in, or delete it: the report then "
            "says less."
        ) from None


def _model(info: BundleInfo) -> dict[str, Any]:
    return {
        "architecture": info.architecture.name,
        "pooling": info.architecture.pooling,
        "classes": list(info.classes),
        "threshold": info.threshold,
        "temperature": info.temperature,
        "views": 1 if info.tta is None else info.tta.views,
        "refuses_unseen": list(info.refuse),
        "out_of_distribution": None if info.ood is None else {"kind": info.ood.kind, "threshold": info.ood.threshold},
        "weights_sha256": info.weights_sha256,
        "provenance": dict(info.provenance),
    }


def _data(cases: Sequence[Case]) -> dict[str, Any]:
    """Who is in the data: counts, never persons."""
    ages = [case.age for case in cases if case.age is not None]
    return {
        "cases": len(cases),
        "patients": len({case.patient_id for case in cases}),
        "labels": _counted(case.label or "no label" for case in cases),
        "sites": _counted(case.site or "not given" for case in cases),
        "sex": _counted(case.sex or "not given" for case in cases),
        "age_years": {"youngest": min(*ages, OLDEST), "oldest": min(max(ages), OLDEST)} if ages else None,
        "age_not_given": len(cases) - len(ages),
    }


def _counted(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _evaluation(report: Report) -> dict[str, Any]:
    figures = {name: getattr(report, name) for name in FIGURES}
    return {
        "cases": report.cases,
        "patients": report.patients,
        "confidence": report.confidence,
        "figures": {name: asdict(value) for name, value in figures.items() if value is not None},
        "groups": [
            {
                "attribute": table.attribute,
                "positive": table.positive,
                "verdict": table.verdict,
                "equalized_odds": asdict(table.equalized_odds),
                "groups": [
                    {"name": group.name, "patients": group.patients, "few": group.small}
                    | {name: asdict(getattr(group, name)) for name in ("auroc", "tpr", "fpr")}
                    for group in table.groups
                ],
            }
            for table in report.fairness
        ],
    }


def _warnings(report: Report) -> list[str]:
    """What the figures themselves say against relying on them."""
    found = []
    if math.isnan(report.auroc.low):
        found.append("AUROC or its interval is undefined: nothing is known of how well classes are told apart.")
    elif report.auroc.low <= 0.5:
        found.append("AUROC may be no better than chance.")
    for table in report.fairness:
        name = title(table.attribute)
        if table.auroc_alone.low > 0.5:
            found.append(f"{name} alone predicts {table.positive} with AUROC {table.auroc_alone}: confounding.")
        if table.verdict == "not met":
            found.append(f"Equalized odds are not met by {name} ({table.positive}): {table.equalized_odds}.")
        if few := [group.name for group in table.groups if group.small]:
            found.append(f"Too few patients to rely on by {name} ({table.positive}): {'; '.join(few)}.")
    return found


def _markdown(card: Mapping[str, Any]) -> str:
    environment = templates(escape=False)
    environment.filters["interval"] = _interval
    environment.filters["cell"] = lambda text: str(text).replace("|", r"\|").replace("\n", " ")
    return environment.get_template("model_card.md.j2").render(card=card)


def _interval(value: Mapping[str, float | None]) -> str:
    if value["point"] is None:
        return "undefined"
    ends = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['point']:.2f}{ends}"
