"""Attention maps of a trained network, their rollout, and the similarity of its position embeddings.

Axes as in :mod:`vit_lightning.model.vit`, and L layers.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_lightning.model.vit import Attention, ViT


@torch.no_grad()
def attention_maps(model: ViT, images: Tensor) -> Tensor:
    """The attention weights of every head in every block, from every token to every token.

    The network runs unchanged; hooks compute the weights, which its fused attention does not return.

    Args:
        model: the network, in evaluation mode.
        images: (B, C, S, S), normalised.

    Returns:
        (B, L, H, N, N): rows sum to 1. Tokens are the class token if there is one, the patches row by row, and the
        registers.

    Raises:
        ValueError: if the model is in training mode, or has no attention.
    """
    if model.training:
        raise ValueError("attention maps need a model in evaluation mode: call model.eval()")
    maps: list[Tensor] = []

    def keep(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(attention, Attention)
        given = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
        maps.append(attention.weights(given["x"], given.get("rotation")))

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if not attentions:
        raise ValueError("the network has no attention to show")
    hooks = [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in attentions]
    try:
        model.forward(images)  # not __call__, which would run a compiled network without its hooks
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps, dim=1)


def attention_rollout(maps: Tensor) -> Tensor:
    """The contribution of each input token to each token's output, through all layers.

    Attention rollout (Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928, section 3): the mean over heads,
    averaged with the identity for the residual connection, multiplied layer by layer.

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
    """The attention of the head's input to each patch, in the layout of the image.

    Args:
        model: the network that the tokens belong to.
        attention: (…, N, N), from tokens to tokens.

    Returns:
        (…, n, n), n patches along a side of the image: the class token's row if there is one, otherwise the mean over
        the patches' rows (unweighted for a learned pooling as well). The share of other tokens is left out.
    """
    side = model.side
    first = model.first
    patches = slice(first, first + side**2)
    rows = attention[..., 0, patches] if first else attention[..., patches, patches].mean(dim=-2)
    return rows.unflatten(-1, (side, side))


def position_similarity(model: ViT) -> Tensor:
    """Cosine similarity of each patch's position embedding to every other's.

    Returns:
        (n, n, n, n): between the patches at the first two and the last two indices; n patches along a side.

    Raises:
        ValueError: if the network has no position embedding.
    """
    if model.pos_embed is None:
        raise ValueError("a network with model.position=rotary has no position embeddings to compare")
    positions = F.normalize(model.pos_embed[0, -(model.side**2) :].detach(), dim=-1)
    square = (model.side, model.side)
    return (positions @ positions.T).unflatten(1, square).unflatten(0, square)
