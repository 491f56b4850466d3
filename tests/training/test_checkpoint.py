import pytest
import torch
from safetensors.torch import save_file

from medvit.training import checkpoint


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    decayed, plain = {"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 1 / 3, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, plain])
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "last.safetensors"


def test_round_trip_keeps_tensors_and_record(path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3, dtype=torch.int64)}
    checkpoint.save(path, tensors, {"epoch": 2, "score": [-float("inf"), 0.1 + 0.2]})
    found, about = checkpoint.load(path)
    assert about == {"epoch": 2, "score": [-float("inf"), 0.1 + 0.2]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_tensors_that_share_memory_are_kept(path):
    tensor = torch.ones(3)
    checkpoint.save(path, {"a": tensor, "b": tensor}, {})
    assert set(checkpoint.load(path)[0]) == {"a", "b"}


def test_optimizer_goes_on_bit_for_bit(path):
    model, optimizer = trained()
    step(model, optimizer)
    tensors, groups = checkpoint.pack_optimizer(optimizer)
    checkpoint.save(path, tensors | {f"model.{k}": v for k, v in model.state_dict().items()}, {"optimizer": groups})
    step(model, optimizer)

    again, fresh = trained()
    found, about = checkpoint.load(path)
    again.load_state_dict({k[6:]: v for k, v in found.items() if k.startswith("model.")})
    checkpoint.unpack_optimizer(fresh, found, about["optimizer"])
    step(again, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_no_part_is_left(path):
    checkpoint.save(path, {"a": torch.ones(3)}, {})
    assert [file.name for file in path.parent.iterdir()] == ["last.safetensors"]


def test_failed_write_leaves_the_old_checkpoint(path):
    checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": 1})
    with pytest.raises(TypeError):
        checkpoint.save(path, {"a": torch.zeros(3)}, {"epoch": object()})
    assert checkpoint.load(path)[1] == {"epoch": 1}


def test_killed_write_leaves_the_old_checkpoint(path, monkeypatch):
    checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": 1})

    def killed(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"a": torch.zeros(3)}, {"epoch": 2})
    assert checkpoint.load(path)[1] == {"epoch": 1}


def test_absent_checkpoint_is_none(path):
    assert checkpoint.load(path) is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b[:-1] + bytes([b[-1] ^ 1]), bytes.lower]
)
def test_damaged_checkpoint_is_none(damage, path):
    checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": "One"})
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoint.load(path) is None


def test_file_of_another_program_is_none(path):
    path.parent.mkdir()
    save_file({"a": torch.ones(3)}, path)
    assert checkpoint.load(path) is None
