"""Masked autoencoder: three quarters of the patches are hidden, and what they show is to be told from the rest.

The encoder sees the visible patches alone, which makes it cheap; a small decoder, thrown away afterwards, fills in the
rest. Nothing is compared between slices: neither patients nor batch sizes matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier
from medvit.models.compression import kept_tokens
from medvit.models.crops import encode_patches, plain_vit
from medvit.objectives.objective import Batch, Objective, Task
from medvit.objectives.selfsupervised import slices_of, train_backbone_only
from medvit.records import UsageError

HEAD_WIDTH = 32
"""Of a head of the decoder's attention, as in the paper."""

EPSILON = 1e-6
"""Added to the variance of a patch: air has none."""


class Mae(Objective):
    """Masked autoencoder (He et al. 2021, arXiv 2111.06377), with pixels normalised in each patch.

    Which patches are hidden is drawn anew for each view from torch's global generator.

    Of a compressed backbone fewer of the visible patches are seen; as many are told.

    Logged: `reconstruction`, the loss of this process's batch alone; 1 is telling the mean of each patch.

    Args:
        classifier: whose backbone is trained; a plain ViT.
        config: share of hidden patches, width and depth of the decoder.
        task: not used.

    Raises:
        UsageError: another model, or one that drops patches by itself.
    """

    patches_vary = False  # pixels are told patch by patch

    def __init__(self, classifier: CtClassifier, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.classifier, self.share = classifier, config.pretraining.mask_share
        train_backbone_only(classifier)
        backbone, settings = classifier.backbone, config.pretraining
        model = plain_vit(backbone)
        if not isinstance(model.patch_drop, nn.Identity):
            raise UsageError("model.options.patch_drop_rate: objective.name mae chooses patches itself. Leave it out.")
        self.decoder = Decoder(
            int(model.num_features),
            settings.decoder_width,
            settings.decoder_depth,
            outputs=backbone.patch**2 * int(model.patch_embed.proj.in_channels),
            prefix=backbone.prefix_tokens,
        )

    def totals(self, batch: Batch) -> Tensor:
        """Number of slices, (1,): all views of all slices have as many hidden patches."""
        return batch["mask"].sum()[None].float()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch."""
        slices, backbone = slices_of(batch), self.classifier.backbone
        views = slices.views.flatten(0, 1)
        rows, columns = backbone.grid
        visible, hidden = draw_mask(len(views), rows * columns, self.share, views.device)
        if backbone.training:
            visible = visible[:, : kept_tokens(backbone.compression.keep, visible.shape[1])]  # in random order
        tokens = encode_patches(backbone, views, visible)
        told = self.decoder(tokens, visible, hidden, (rows, columns))
        losses = patch_losses(told, patchify(views, backbone.patch), hidden)
        loss = losses.sum() / slices.views.shape[1]  # (N * V,) -> sum over slices of their mean over views
        return {"loss": loss / batch["totals"][0], "reconstruction": losses.detach().mean()}


class Decoder(nn.Module):
    """Tokens of visible patches -> pixels of the hidden ones. Its positions are sines: any grid will do.

    Args:
        width: of the encoder's tokens.
        inner: of its own.
        depth: blocks.
        outputs: numbers of a patch.
        prefix: tokens before the patches.
    """

    def __init__(self, width: int, inner: int, depth: int, *, outputs: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(width, inner)
        self.unknown = nn.Parameter(0.02 * torch.randn(inner))
        block = nn.TransformerEncoderLayer(
            inner, inner // HEAD_WIDTH, 4 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(inner), enable_nested_tensor=False)
        self.head = nn.Linear(inner, outputs)

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tell the hidden patches.

        Args:
            tokens: (B, P + K, D) of the encoder, prefix first.
            visible: (B, K) numbers of the patches that they are of.
            hidden: (B, M) numbers of the others.
            grid: rows and columns of patches.

        Returns:
            (B, M, outputs), in the order of `hidden`.
        """
        known = self.embed(tokens)
        places = sine_positions(*grid, known.shape[-1]).to(known)
        patches = known[:, self.prefix :] + places[visible]
        asked = self.unknown.to(known.dtype) + places[hidden]
        told: Tensor = self.blocks(torch.cat([known[:, : self.prefix], patches, asked], dim=1))
        pixels: Tensor = self.head(told[:, -hidden.shape[1] :])
        return pixels


def draw_mask(count: int, patches: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Visible (count, K) and hidden (count, M) patches of each picture, drawn without replacement.

    M is `share` of the patches, rounded; there is one of each at least.
    """
    hidden = min(max(1, round(share * patches)), patches - 1)
    order = torch.rand(count, patches).argsort(dim=1).to(device)  # drawn on the CPU: the same on every device
    return order[:, hidden:], order[:, :hidden]


def patchify(pictures: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C), patches along rows, within a patch pixel by pixel."""
    B, C, H, W = pictures.shape
    parts = pictures.view(B, C, H // patch, patch, W // patch, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, patch * patch * C) -> (B, C, H, W), N patches along the rows of a grid."""
    B, (rows, columns) = len(patches), grid
    parts = patches.view(B, rows, columns, patch, patch, -1)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, columns * patch)


def patch_losses(told: Tensor, patches: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error on hidden patches alone, each with mean 0 and variance 1.

    Args:
        told: (B, M, L) of the hidden patches.
        patches: (B, N, L) all of them as they are.
        hidden: (B, M) which of them.

    Returns:
        (B,)
    """
    target = patches.gather(1, hidden[:, :, None].expand(-1, -1, patches.shape[-1]))
    mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (variance + EPSILON).sqrt()
    return (told - target).square().mean(dim=(1, 2))


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of row and column, a quarter of the width each: (rows * columns, width)."""
    quarter = width // 4
    frequencies = 10000 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
