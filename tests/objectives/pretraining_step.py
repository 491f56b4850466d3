"""One step of pretraining in one process or in several, for the test that they agree. Imports no pytest."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from medvit.config import ModelConfig, ObjectiveConfig, PretrainingConfig
from medvit.models.classifier import build_classifier
from medvit.objectives import OBJECTIVES, Objective, Task, mae

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
SMALL = {"hidden": 16, "width": 8, "prototypes": 12, "decoder_width": 32, "decoder_depth": 1}
METHODS = ("simclr", "mocov3", "dino", "mae")

PATIENTS = torch.tensor([0, 1, 2, 0, 3])  # the first and the fourth case are of one person
PROGRESS = 0.2


def make_objective(name: str, *, drop: float = 0.0, model: str = "vit_tiny_patch16_224", **settings: Any) -> Objective:
    """The same weights every time, in double precision; `drop`: dropout in the backbone."""
    torch.manual_seed(0)
    options = {**TINY, "proj_drop_rate": drop} if model.startswith("vit") else {}
    config = ModelConfig(name=model, weights="none", options=options)
    classifier = build_classifier(config, size=32, channels=3, classes=1)[0].double()
    chosen = ObjectiveConfig(name=name, pretraining=PretrainingConfig(**{**SMALL, **settings}))
    return OBJECTIVES[name](classifier, chosen, Task(())).double().train()


def make_batch(*, local: int = 0, cases: list[int] | None = None) -> dict[str, Tensor]:
    """Five cases of up to three slices, two views each; `cases`: only these."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    batch = {"input": noise(5, 3, 2, 3, 32, 32), "mask": mask, "patient": PATIENTS, "index": torch.arange(5)}
    if local:
        batch["local"] = noise(5, 3, local, 3, 16, 16)
    return batch if cases is None else {name: values[cases] for name, values in batch.items()}


def local_of(name: str) -> int:
    return 2 if name == "dino" else 0


def run(objective: Objective, batch: dict[str, Tensor], progress: float = PROGRESS) -> dict[str, Tensor]:
    return objective({**batch, "totals": objective.totals(batch)}, progress)


def gradients(objective: Objective) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


Step = tuple[dict[str, Tensor], dict[str, Tensor], float]


def hide_the_same(count: int, patches: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """In place of `draw_mask`, whose draws no two processes share: the first patches of each picture are hidden."""
    order = torch.arange(patches, device=device).expand(count, -1)
    return order[:, round(share * patches) :], order[:, : round(share * patches)]


def step_alone(name: str) -> Step:
    """Gradients, buffers after the step, and the loss of the whole batch in one process."""
    objective = make_objective(name)
    with patch.object(mae, "draw_mask", hide_the_same):
        loss = run(objective, make_batch(local=local_of(name)))["loss"]
    loss.backward()
    objective.after_step()
    return gradients(objective), dict(objective.named_buffers()), float(loss.detach())


def step_together(rank: int, world: int, folder: str) -> None:
    """What one of several processes does; the first writes `<name>.pt` into the folder."""
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    mae.draw_mask = hide_the_same
    for name in METHODS:
        objective = make_objective(name)
        wrapped = DistributedDataParallel(objective)
        batch = make_batch(local=local_of(name), cases=list(range(5))[rank::world])
        totals = objective.totals(batch)
        distributed.all_reduce(totals)
        loss = wrapped({**batch, "totals": totals / world}, PROGRESS)["loss"]
        loss.backward()
        objective.after_step()
        mean_loss = loss.detach().clone()
        distributed.all_reduce(mean_loss)
        if rank == 0:
            step = (gradients(objective), dict(objective.named_buffers()), float(mean_loss) / world)
            torch.save(step, Path(folder) / f"{name}.pt")
    distributed.destroy_process_group()
