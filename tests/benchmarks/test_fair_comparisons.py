"""What the benchmarks compare: never memory alone, and never at an equal number of steps."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

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


def test_pretrainings_are_compared_at_equal_seconds(benchmark_named, monkeypatch):
    """What sees fewer tokens may take more steps, as many more as its own measured cost allows."""
    run = benchmark_named("pretraining_run")
    clock = iter(range(1_000))
    monkeypatch.setattr(run.time, "process_time", lambda: next(clock))  # every step takes a second
    monkeypatch.setattr(run, "batches", lambda *_given, **_settings: iter(dict, None))
    monkeypatch.setattr(run, "take_step", lambda *_given: 0.0)
    pictures = benchmark_named("pretraining_sets").Pictures(Path(), *[None] * 3, size=32, patch=4, channels=1)
    steps = {
        strategy: run.settle(run.Job("digits", "simclr", strategy, 1.0, 0), pictures, 120.0)
        for strategy in run.STRATEGIES
    }
    assert steps == dict.fromkeys(run.STRATEGIES, 120)  # not fewer for fewer tokens: for seconds
    monkeypatch.setattr(run.time, "process_time", lambda: next(clock) / 4)
    assert run.settle(run.Job("digits", "simclr", "relaxing", 0.5, 0), pictures, 60.0) == 240
