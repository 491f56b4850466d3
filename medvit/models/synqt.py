"""SynQT: a small network beside a frozen ViT that asks it questions (Zhang et al. 2024, arXiv 2407.06964).

At each block a few learned queries are synthesised from what the block below answered, and put to the frozen block,
which answers from its own tokens: queries are never among its keys, so that its tokens stay those of the plain ViT. No
gradient passes through them, and of each block only keys and values are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from timm.layers import DropPath
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medvit.config import ModelConfig
from medvit.models.backbone import Backbone
from medvit.records import UsageError

BOTTLENECK, ATTENTION_BOTTLENECK = 48, 8
"""Hidden widths of the adapters (section 4 of the paper's code)."""

DROPOUT, TOKEN_DROPOUT = 0.1, 0.3
"""In adapters; and of a block's answers where they are put together."""

SCALE = 0.1
"""Where the learned weights of attention, adapter and recurrence start; the paper tries 0.1 and 1."""


class Dropout(nn.Dropout):
    """As torch's, but what it remembers for the backward pass is a byte a value on a CPU too, not a float."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        dropped: Tensor = torch.native_dropout(x, self.p, self.training)[0] if self.training else x
        return dropped


class Adapter(nn.Module):
    """x + W2 GELU(W1 x), which starts as x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(width, hidden), nn.Linear(hidden, width), Dropout(DROPOUT)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        added: Tensor = self.dropout(self.up(self.dropout(functional.gelu(self.down(x)))))
        return x + added


class QueryAttention(nn.Module):
    """Attention of the queries of one block over each other; its projections are adapters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_queries, self.norm_keys = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys, self.values, self.out = (Adapter(width, ATTENTION_BOTTLENECK) for _ in range(4))
        self.dropout = Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        queries, others = self.queries(self.norm_queries(x)), self.norm_keys(x)
        share = DROPOUT if self.training else 0.0
        seen = functional.scaled_dot_product_attention(queries, self.keys(others), self.values(others), dropout_p=share)
        mixed: Tensor = self.dropout(self.out(seen))
        return mixed


class QuerySynthesis(nn.Module):
    """Queries of one block: learned ones, and what the block below answered (the paper's QSM)."""

    def __init__(self, width: int, prompts: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(prompts, width).uniform_(-1, 1))
        self.project, self.adapt = Adapter(width, BOTTLENECK), Adapter(width, BOTTLENECK)
        self.norm_attention, self.norm_adapter = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.dropout = QueryAttention(width), Dropout(DROPOUT)
        self.attention_scale, self.adapter_scale = nn.Parameter(torch.tensor(SCALE)), nn.Parameter(torch.tensor(SCALE))

    def forward(self, below: Tensor) -> Tensor:
        """What came from below (B, 1, D) -> queries (B, P, D)."""
        x = self.project(self.prompts + below)
        x = x + self.attention_scale * self.attention(self.norm_attention(x))
        x = x + self.adapter_scale * self.adapt(self.norm_adapter(x))
        queries: Tensor = self.dropout(x)
        return queries


class Combination(nn.Module):
    """The answers of all blocks -> features; how much each counts follows from the last one."""

    def __init__(self, width: int, blocks: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.adapt = nn.LayerNorm(width), Adapter(width, BOTTLENECK)
        self.drop_token = DropPath(TOKEN_DROPOUT)
        self.weigh, self.dropout = nn.Linear(width, 3 * blocks), Dropout(DROPOUT)
        self.out = nn.LayerNorm(width)
        if isinstance(norm, nn.LayerNorm):  # the ViT's own, where it has one
            self.out.load_state_dict(norm.state_dict())

    def forward(self, last: Tensor, answers: Tensor) -> Tensor:
        """Last answer (B, D), all answers (B, 3L, D) -> (B, D)."""
        last, answers = last + self.adapt(self.norm(last)), answers + self.adapt(self.norm(answers))
        answers = self.drop_token(answers.flatten(0, 1)).view_as(answers)
        weights = torch.tanh(self.dropout(functional.gelu(self.weigh(last))))
        mixed = (last + (weights[..., None] * answers).sum(dim=1)) / (1 + answers.shape[1])
        features: Tensor = self.out(mixed)
        return features


class SynQT(Backbone):
    """A frozen ViT with SynQT beside it: slices (B, C, H, W) -> features (B, D).

    Args:
        model: a timm ViT with plain attention.
        config: `prompts`: P, how many queries each block is asked: memory against accuracy.
        size: rows and columns it is built for, px.

    Raises:
        UsageError: the model is no such ViT.
    """

    def __init__(self, model: Any, config: ModelConfig, size: int) -> None:
        super().__init__(model, config, size)
        blocks = model.blocks if isinstance(model, VisionTransformer) else ()
        if not blocks or not all(type(block) is Block and type(block.attn) is Attention for block in blocks):
            raise UsageError(
                f"model.tuning synqt: {config.name} ({type(model).__name__}) is not made of timm's plain blocks. "
                "Choose a ViT, DeiT or DINOv2 as model.name, or another model.tuning."
            )
        self.width = model.num_features
        self.attends, self.recomputes = False, False
        self.syntheses = nn.ModuleList(QuerySynthesis(self.width, config.prompts) for _ in blocks)
        self.below = nn.Parameter(torch.tensor(SCALE))
        self.combination = Combination(self.width, len(blocks), model.norm)

    def forward(self, slices: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        return self._ask(self._states(slices), len(slices))

    @property
    def trunk_shape(self) -> tuple[int, ...]:
        """Tokens of all blocks, and their width."""
        rows, columns = self.grid
        return len(self.syntheses) * (self.prefix_tokens + rows * columns), self.width

    def trunk(self, slices: Tensor) -> Tensor:
        """Tokens that enter each block, (B, L N, D): all that the frozen part has to say."""
        return torch.cat(list(self._states(slices)), dim=1)

    def finish(self, states: Tensor) -> Tensor:
        """`trunk`'s (B, L N, D) -> features (B, D)."""
        return self._ask(iter(states.chunk(len(self.syntheses), dim=1)), len(states))

    def _states(self, slices: Tensor) -> Iterator[Tensor]:
        """Tokens (B, N, D) that enter each block; the last block's own output is not needed.

        One at a time, so that no more than one is alive. Gradients reach slices where somebody asks how they matter.
        """
        model = self.model
        wanted = slices.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted):
            tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(slices))))
        for block in model.blocks[:-1]:
            yield tokens
            with torch.set_grad_enabled(wanted):
                tokens = block(tokens)
        yield tokens

    def _ask(self, states: Iterator[Tensor], count: int) -> Tensor:
        answer, answers = self.below.new_zeros((count, 1, self.width)), list[Tensor]()
        for synthesis, block, tokens in zip(self.syntheses, self.model.blocks, states, strict=True):
            queries = synthesis(self.below * answer)
            if self.recomputes and self.training:
                found = checkpoint(answered, block, queries, tokens, use_reentrant=False)
            else:
                found = answered(block, queries, tokens)
            answer, attended, processed = (part.mean(dim=1, keepdim=True) for part in found)
            answers += [answer, attended, processed]
        features: Tensor = self.combination(answer[:, 0], torch.cat(answers, dim=1))
        return features

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """What learns beside the ViT, which never does: all, the parts at its top `blocks` blocks, or nothing."""
        self.requires_grad_(trainable == "all")
        if trainable == "top":
            self.combination.requires_grad_(True)
            self.syntheses[-blocks:].requires_grad_(True)
        self.model.requires_grad_(False)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep what enters a block instead of its keys and values, and compute these a second time."""
        self.recomputes = on


def answered(block: Any, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a frozen block makes of queries (B, P, D) that look at its tokens (B, N, D) (the paper's KEM).

    Returns:
        The answer, and what attention and MLP added to the queries for it: (B, P, D) each.
    """
    attention, asking = block.attn, block.norm1(queries)
    keys, values = _keys_values(block, tokens)
    asked = attention.q_norm(_projected(attention, asking, 0))
    seen = functional.scaled_dot_product_attention(asked, keys, values, scale=attention.scale)
    seen = attention.norm(seen.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        seen = seen * attention.gate(asking).sigmoid()
    attended = block.ls1(attention.proj(seen))
    between = queries + attended
    processed = block.ls2(block.mlp(block.norm2(between)))
    return between + processed, attended, processed


def _keys_values(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, heads, N, d) each, computed by themselves: a joint buffer with the queries would stay alive with them."""
    with torch.set_grad_enabled(tokens.requires_grad and torch.is_grad_enabled()):
        seen = block.norm1(tokens)
        return block.attn.k_norm(_projected(block.attn, seen, 1)), _projected(block.attn, seen, 2)


def _projected(attention: Any, x: Tensor, part: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of timm's joint projection: (B, N, D) -> (B, heads, N, d)."""
    rows = slice(part * attention.attn_dim, (part + 1) * attention.attn_dim)
    bias = None if attention.qkv.bias is None else attention.qkv.bias[rows]
    values = functional.linear(x, attention.qkv.weight[rows], bias)
    return values.view(*x.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)
