"""What several processes know together: statistics of the global batch, for losses that are no sum over cases.

A loss that is a sum over cases needs none of this: averaging gradients over processes and dividing by global totals is
enough. A distance between two samples is not such a sum, nor is a weight that is normalised over a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def processes() -> int:
    """How many train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum, without gradient; the same in every process."""
    total = values.detach().clone()
    if processes() > 1:
        distributed.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) of every process, one below the other, with gradient; N may differ between processes, and be 0.

    Every process must go on to compute the same loss from the result: see `_GatherRows.backward`.
    """
    gathered: Tensor = _GatherRows.apply(rows) if processes() > 1 else rows
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world, rank = processes(), distributed.get_rank()
        count = torch.tensor([len(rows)], device=rows.device)
        gathered_counts = [torch.empty_like(count) for _ in range(world)]
        distributed.all_gather(gathered_counts, count)
        counts = [int(n) for n in gathered_counts]
        # all_gather wants one shape: short parts are padded, and cut again
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(parts, padded)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum over processes of the gradients for our rows: all are alike, for all processes have the same loss."""
        return gradients[0][ctx.own] * processes()
