"""What a pilot compares, and how it is made of a training."""

import pytest

from medvit.config import Config
from medvit.training.pilot import default_compressions, first_steps, pilot_config
from tests.training.fits import make_dataset, training


@pytest.mark.parametrize(
    ("sizes", "own", "patches"), [({224}, 14, [16, 28, 32]), ({240}, 16, [20, 24, 30, 40, 48]), ({32, 48}, 8, [16])]
)
def test_patches_that_are_compared_divide_the_slices_of_every_stage(sizes, own, patches):
    found = default_compressions(sizes, own)
    assert sorted({one.patch for one in found if one.patch}) == patches
    assert len(found) == len(set(found)) == 3 + 2 * len(patches)


def test_a_pilot_has_the_stages_of_its_training_and_nothing_accelerated():
    stages = [{"name": "head", "trainable": "head", "epochs": 5}, {"name": "all", "epochs": 20}]
    acceleration = {"schedule": [{"from_progress": 0, "keep": 0.5}, {"from_progress": 0.9}]}
    given = Config.model_validate({"objective": {"acceleration": acceleration}, "training": {"stages": stages}})
    config = pilot_config(given, 8)
    assert [(stage.name, stage.epochs) for stage in config.training.stages] == [("head", 2), ("all", 6)]
    assert config.objective.acceleration is None
    early = Config.model_validate({"training": {"stages": stages, "patience": 2, "select": "best"}})
    assert (pilot_config(early, 8).training.patience, pilot_config(early, 8).training.select) == (0, "last")
    assert [stage.epochs for stage in pilot_config(given, 50).training.stages] == [10, 40]


@pytest.mark.parametrize(("cases", "accumulate", "expected"), [(17, 1, 9), (17, 2, 4), (16, 1, 8)])
def test_steps_that_are_compared_need_not_be_of_equally_many_cases(cases, accumulate, expected):
    """17 cases in batches of 2 are 8 batches of 2 and one of 1: all are steps. An odd batch alone is half a step."""
    dataset = make_dataset(cases)
    config = Config().model_copy(update={"training": training(batch_size=2, accumulate=accumulate)})
    steps = list(first_steps(dataset, config, most=100))
    assert len(steps) == expected
    assert {len(step) for step in steps} == {accumulate}
    seen = [int(index) for step in steps for batch in step for index in batch["index"]]
    assert len(seen) == len(set(seen))
    assert len(list(first_steps(dataset, config, most=4))) == 4
