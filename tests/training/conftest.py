from collections.abc import Callable

import pytest

from medvit.data.dataset import CaseDataset
from tests.training import fits


@pytest.fixture(scope="session")
def make_objective() -> Callable[..., fits.Objective]:
    return fits.make_objective


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., CaseDataset]:
    return fits.make_dataset
