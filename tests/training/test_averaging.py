import pytest
import torch

from medvit.training.averaging import WeightAverage


def module() -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


def move(layer: torch.nn.Linear, value: float) -> None:
    with torch.no_grad():
        layer.weight.fill_(value)


def test_decay_warms_up():
    layer = module()
    average = WeightAverage(layer, 0.2)
    expected = 1.0
    for value, decay in ((2.0, 1 / 10), (3.0, 2 / 11), (4.0, 0.2), (5.0, 0.2)):  # 3 / 12 is more than 0.2
        move(layer, value)
        average.update()
        expected = decay * expected + (1 - decay) * value
        assert float(average.average["weight"]) == pytest.approx(expected)


def test_what_is_not_trained_is_not_averaged():
    assert set(WeightAverage(module(), 0.9).average) == {"weight"}


def test_weights_are_back_after_use_also_after_an_error():
    layer = module()
    average = WeightAverage(layer, 0.9)
    move(layer, 2.0)
    with pytest.raises(ZeroDivisionError) as raised, average.in_place():
        raise ZeroDivisionError(layer.weight.item())
    assert str(raised.value) == "1.0"
    assert (layer.weight.item(), average.average["weight"].item()) == (2.0, 1.0)
