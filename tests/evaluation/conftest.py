"""Synthetic predictions (several cases per patient, sites that differ in prevalence, one served worse) and features."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

Cohort = Callable[..., pd.DataFrame]


def make_cases(n=60, width=8, patients=24, classes=2, seed=0):
    """Features in which classes are apart, several cases per patient, patients of both classes among them."""
    rng = np.random.default_rng(seed)
    groups = np.array([f"p{number}" for number in rng.integers(0, patients, n)])
    labels = rng.integers(0, classes, n)
    centres = 1.5 * rng.normal(size=(classes, width))
    return rng.normal(size=(n, width)) + centres[labels], labels, groups


def make_cohort(
    cases: int = 300, seed: int = 0, sites: tuple[str, ...] = ("North", "South", "West"), harm: float = 0.8
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, max(2, cases // 2), cases)
    site = rng.choice(sites, cases)[patient]
    sex = rng.choice(["F", "M", ""], cases, p=[0.45, 0.45, 0.1])[patient]
    truth = rng.random(cases) < 0.35 + 0.2 * (site == sites[0])
    score = 1 / (1 + np.exp(1 - 1.7 * truth + harm * truth * (site == sites[-1]) - rng.normal(size=cases)))
    return pd.DataFrame(
        {
            "case_id": [f"case{i}" for i in range(cases)],
            "patient_id": [f"Mueller^Anna{i}" for i in patient],
            "label": np.where(truth, "bleed", "none"),
            "p_none": 1 - score,
            "p_bleed": score,
            "site": site,
            "sex": sex,
            "age": rng.integers(1, 95, cases)[patient],
            "fold": patient % 3,
            "threshold": 0.41,
        }
    )


def make_three_classes(cases: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    names = np.array(["none", "benign", "malign"])
    label = rng.integers(0, 3, cases)
    logits = rng.normal(size=(cases, 3)) + 1.5 * np.eye(3)[label]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return pd.DataFrame(
        {
            "case_id": [f"case{i}" for i in range(cases)],
            "patient_id": rng.integers(0, cases // 2, cases),
            "label": names[label],
            **{f"p_{name}": probabilities[:, k] for k, name in enumerate(names)},
            "site": rng.choice(["A", "B"], cases),
        }
    )


@pytest.fixture(scope="session")
def cohort() -> Cohort:
    return make_cohort


@pytest.fixture(scope="session")
def three_classes() -> Cohort:
    return make_three_classes
