"""What a trained network looks at: attention maps, their rollout, and how alike its positions are.

Axes as in :mod:`vit_lightning.model.vit`; L layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_lightning.model.vit import Attention, ViT


@torch.no_grad()
def attention_maps(model: ViT, images: Tensor) -> Tensor:
    """Attention of every head of every block, from every token to every token.

    The network runs as always; beside it the weights, which its fused attention does not make, are worked out.

    Args:
        model: in evaluation mode.
        images: (B, C, S, S), normalised.

    Returns:
        (B, L, H, N, N): rows sum to 1. Tokens are the class token where there is one, the patches row by row, the
        registers.

    Raises:
        ValueError: if the model is in training mode.
    """
    if model.training:
        raise ValueError("attention maps are of a model in evaluation mode: call model.eval()")
    maps: list[Tensor] = []

    def keep(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(attention, Attention)
        x, _, rotation = inputs
        maps.append(attention.weights(x, rotation))

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [attention.register_forward_pre_hook(keep) for attention in attentions]
    try:
        model.forward(images)  # a compiled network would leave out the hooks
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps, dim=1)


def attention_rollout(maps: Tensor) -> Tensor:
    """How much of each token's output comes from each input token, through all layers.

    Attention rollout (Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928, section 3): the mean over heads, half
    of it the identity for the residual connection, multiplied layer by layer.

    Args:
        maps: (B, L, H, N, N), from :func:`attention_maps`.

    Returns:
        (B, N, N): rows sum to 1.
    """
    layers = (maps.mean(dim=2) + torch.eye(maps.shape[-1], device=maps.device)) / 2  # (B, L, N, N)
    rollout = layers[:, 0]
    for layer in layers.unbind(dim=1)[1:]:
        rollout = layer @ rollout
    return rollout


def on_patches(model: ViT, attention: Tensor) -> Tensor:
    """What the head reads, as attention to each patch in its place.

    Args:
        model: whose tokens they are.
        attention: (…, N, N), from tokens to tokens.

    Returns:
        (…, n, n), n patches along a side of the image: of the class token, or of the patches' mean where that is read
        (the plain one, where the head reads a learned one); without the share that goes to other tokens.
    """
    side = model.side
    first = int(model.pool == "cls")
    patches = slice(first, first + side**2)
    rows = attention[..., 0, patches] if first else attention[..., patches, patches].mean(dim=-2)
    return rows.unflatten(-1, (side, side))


def position_similarity(model: ViT) -> Tensor:
    """Cosine similarity of each patch's learned position with every other's.

    Returns:
        (n, n, n, n): of the patch in the first two indices with that in the last two; n patches along a side.

    Raises:
        ValueError: if positions are not learned.
    """
    if model.pos_embed is None:
        raise ValueError("model.position=rotary learns no positions to compare")
    positions = F.normalize(model.pos_embed[0, -(model.side**2) :].detach(), dim=-1)
    square = (model.side, model.side)
    return (positions @ positions.T).unflatten(1, square).unflatten(0, square)
