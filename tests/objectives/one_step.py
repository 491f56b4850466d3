"""One step of an objective in one process or in several, for the test that they agree. Imports no pytest."""

from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from medvit.config import ModelConfig, ObjectiveConfig
from medvit.data.sampling import share
from medvit.models.classifier import build_classifier
from medvit.objectives import Objective, Task, build_objective

LABELS = torch.tensor([0, 1, 0, 0, 1, -1, -1, -1])  # 5 and 3: no two processes have the same number
DOMAINS = torch.tensor([0, 1, 0, 1, 0, 2, 2, 2])
SETTINGS = {
    "supervised": {"label_smoothing": 0.1},
    "dann": {},
    "cdan": {},
    "mmd": {},
    "unbiased": {"name": "mmd", "unbiased": True},
    # larger patches are not random: every process sees what one alone sees
    "accelerated": {
        "name": "dann",
        "acceleration": {"schedule": [{"from_progress": 0, "patch": 32}, {"from_progress": 0.9}]},
    },
}
PROGRESS = 0.2
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16}


def make_objective(name: str) -> Objective:
    """With the same weights in every process and no dropout."""
    torch.manual_seed(0)
    config = ModelConfig(name="vit_tiny_patch16_224", weights="none", options=TINY)
    classifier = build_classifier(config, size=32, channels=3, classes=2)[0].double()
    settings = ObjectiveConfig(**{"name": name, **SETTINGS[name]})
    objective = build_objective(classifier, settings, Task((30, 10), 3)).double()
    for module in objective.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return objective


def global_batch() -> dict[str, Tensor]:
    """Different slices per case, so that masks matter too."""
    values = torch.randn(8, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[5:] += 0.5
    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[2, 1] = False
    return {"input": values, "mask": mask, "label": LABELS, "domain": DOMAINS, "index": torch.arange(8)}


def gradients(objective: Objective) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def step_alone(name: str) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of the global batch in one process."""
    objective, batch = make_objective(name), global_batch()
    loss = objective({**batch, "totals": objective.totals(batch)}, PROGRESS)["loss"]
    loss.backward()
    return gradients(objective), float(loss.detach())


def step_together(rank: int, world: int, folder: str) -> None:
    """What one of several processes does; the first writes `<name>.pt` into the folder."""
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    mine = share(list(range(8)), LABELS.numpy(), rank, world)
    for name in SETTINGS:
        objective = make_objective(name)
        wrapped = DistributedDataParallel(objective)
        batch = {key: values[mine] for key, values in global_batch().items()}
        totals = objective.totals(batch)
        distributed.all_reduce(totals)
        loss = wrapped({**batch, "totals": totals / world}, PROGRESS)["loss"]
        loss.backward()
        mean_loss = loss.detach().clone()
        distributed.all_reduce(mean_loss)
        if rank == 0:
            torch.save((gradients(objective), float(mean_loss) / world), Path(folder) / f"{name}.pt")
    distributed.destroy_process_group()
