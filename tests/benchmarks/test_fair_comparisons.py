"""What the benchmarks compare: never memory alone, and never at an equal number of steps."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from medvit.objectives.acceleration import compression_at

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_named(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setenv("MEDVIT_SITE_KEY", "benchmarks")
        return importlib.import_module(name)

    return load


def test_whoever_tells_the_memory_of_tuning_tells_its_time_too(benchmark_named, capsys):
    """SynQT keeps little for the backward pass, and predicts more slowly: one without the other misleads."""
    tuning = benchmark_named("tuning")
    rows = tuning.measure("vit_tiny_patch16_224", 64, rounds=1)
    assert set(rows) == set(tuning.ARMS)
    for row in rows.values():
        assert min(row["kept_mib"], row["step_s"], row["predict_s"], row["trainable"]) > 0
    assert rows["SynQT, P = 1"]["kept_mib"] < rows["LoRA"]["kept_mib"] < rows["full"]["kept_mib"]
    tuning.show("tiny", rows)
    assert "predicting, of full" in capsys.readouterr().out


def test_pretrainings_are_compared_at_equal_compute(benchmark_named, monkeypatch):
    """What sees fewer tokens takes more steps: as many more as its own measured price allows, and not one for free."""
    run, plan = benchmark_named("pretraining_run"), benchmark_named("pretraining")
    seen_as = {(1.0, None): 0.1, (1.0, 2): 0.04, (0.5, 2): 0.02}  # seconds of a step

    class Learning:
        def __init__(self, *_given):
            self.objective = type("Any", (), {"patches_vary": True})

        def step(self, number, seen):
            return seen_as[seen.keep, seen.patch] + 1000 * (number < 2)  # the first rounds are slow, and do not count

    monkeypatch.setattr(run, "Learning", Learning)
    pictures = SimpleNamespace(patch=1)
    prices = {name: run.price(name, "digits", pictures) for name in (*plan.METHODS, "mae")}
    relaxing = 0.3 * 0.02 + 0.55 * 0.04 + 0.15 * 0.1
    assert prices["simclr"] == pytest.approx({"uncompressed": 0.1, "constant": 0.04, "relaxing": relaxing})
    jobs = plan.Plan(("digits",), quick=False).jobs("digits", prices)
    steps = {(job.strategy, job.share): job.steps for job in jobs if job.objective == "simclr" and job.steps}
    seconds = plan.SECONDS["digits"]
    assert steps["uncompressed", 1.0] == int(seconds / 0.1)
    assert steps["relaxing", 0.5] == int(0.5 * seconds / relaxing)
    assert all(steps[strategy, share] * prices["simclr"][strategy] <= share * seconds for strategy, share in steps)


def test_a_relaxing_pretraining_sees_whole_slices_in_the_end(benchmark_named):
    run = benchmark_named("pretraining_run")
    steps = run.schedule("relaxing", 3)
    shares = [compression_at(steps, number / 100).share(3) for number in range(100)]
    assert shares == sorted(shares)
    assert (shares[0], shares[84], shares[85], shares[-1]) == (0.125, 0.25, 1, 1)
