"""The Vision Transformer, in pure PyTorch.

After "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929, section 3.1). The
default sizes are those of the Keras example "Image classification with Vision Transformer".

Axes:
    B  batch              N  tokens (class token, patches, registers)
    C  image channels     D  width of a token (``embed_dim``)
    S  image size         H  heads
    P  patch size         K  width of a head (D / H)
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from vit_lightning import register
from vit_lightning.config import ModelConfig
from vit_lightning.keys import InputError
from vit_lightning.model.layers import (
    Dropout,
    LayerScale,
    learned_tokens,
    mlp_head,
    resize_positions,
    rotary_angles,
    rotate,
)


class Attention(nn.Module):
    """Multi-head self-attention without a mask (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.2.2).

    Equivalent to :class:`torch.nn.MultiheadAttention`, with the same initialisation.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, queries: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """Attend to all tokens.

        Args:
            x: (B, N, D).
            queries: Q, to compute the output of the first Q tokens only; ``None`` for all of them.
            rotation: (2, N, K), from :func:`~vit_lightning.model.layers.rotary_angles`.

        Returns:
            (B, Q, D).
        """
        if queries is None:
            q, k, v = self._split(self.qkv(x))
        else:
            D, weight, bias = x.shape[2], self.qkv.weight, self.qkv.bias
            [q] = self._split(F.linear(x[:, :queries], weight[:D], bias[:D]))  # (B, H, Q, K)
            k, v = self._split(F.linear(x, weight[D:], bias[D:]))  # (B, H, N, K) each
        if rotation is not None:
            q, k = rotate(q, rotation[:, : q.shape[2]]), rotate(k, rotation)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            # On CPUs in bfloat16, the gradient of the fused kernel is several times slower than this.
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)  # (B, H, Q, N)
            x = weights.to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, H, Q, K)
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return the attention weights (B, H, N, N) from each token of x (B, N, D) to each token."""
        q, k, _ = self._split(self.qkv(x))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split (B, N, n · D) into n tensors (B, H, N, K)."""
        D = self.proj.in_features
        return x.unflatten(2, (x.shape[2] // D, self.heads, D // self.heads)).permute(2, 0, 3, 1, 4).unbind()


@register.block("prenorm")
class PreNormBlock(nn.Module):
    """``x + drop(attn(norm1(x)))``, then ``x + mlp(norm2(x))``.

    The residual branches can be scaled (:class:`~vit_lightning.model.layers.LayerScale`), start at zero
    (``config.zero_init``) and be skipped for a random subset of the images (``drop_path``; Huang et al., 2016,
    https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=config.norm_eps)
        self.attn = Attention(D, config.heads)
        self.drop = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(D, eps=config.norm_eps)
        out = nn.Linear(config.mlp_dim, D)
        self.mlp = nn.Sequential(nn.Linear(D, config.mlp_dim), nn.GELU(), Dropout(config.dropout), out)
        scale = config.layer_scale
        self.scale1, self.scale2 = (nn.Identity() if scale is None else LayerScale(D, scale) for _ in range(2))
        self.drop_path = StochasticDepth(drop_path, "row")
        if config.zero_init:
            for parameter in (self.attn.proj.weight, out.weight, out.bias):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, queries: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or only the first ``queries`` tokens of it, at their cost."""
        a = self.drop(self.attn(self.norm1(x), queries, rotation))
        x = x[:, :queries] + self.drop_path(self.scale1(a))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


@register.block("blog")
class BlogBlock(nn.Module):
    """The tutorial's block: ``a = norm_in(x)``, ``h = norm_1(x + drop(attn(a)))``, ``norm_2(h + ffn(h))``.

    Its feed-forward network has GELU and dropout after the second linear layer too.
    """

    final_norm = False

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm_in = nn.LayerNorm(D, eps=config.norm_eps)
        self.attn = Attention(D, config.heads)
        self.drop = Dropout(config.dropout)
        self.norm_1 = nn.LayerNorm(D, eps=config.norm_eps)
        self.ffn = nn.Sequential(
            *(nn.Linear(D, config.mlp_dim), nn.GELU(), Dropout(config.dropout)),
            *(nn.Linear(config.mlp_dim, D), nn.GELU(), Dropout(config.dropout)),
        )
        self.norm_2 = nn.LayerNorm(D, eps=config.norm_eps)

    def forward(self, x: Tensor, queries: int | None = None, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or only the first ``queries`` tokens of it, at their cost."""
        h = self.norm_1(x[:, :queries] + self.drop(self.attn(self.norm_in(x), queries, rotation)))
        return self.norm_2(h + self.ffn(h))


class ViT(nn.Module):
    """Vision Transformer classifier: patches, position embedding, blocks, pooling and an MLP head.

    By default the head reads a class token in front of the patches; ``config.pool`` selects an average of the patches
    instead. Register tokens (Darcet et al., 2024, https://arxiv.org/abs/2309.16588) follow the patches.

    A registered block is constructed with the configuration and its drop-path rate; it maps (B, N, D) to (B, N, D).
    Its ``forward`` may also take ``rotation``, for rotary positions, and ``queries``, the number of leading tokens
    whose output is needed; its attribute ``final_norm`` (default: True) says whether a norm follows the last block.

    Two defects of the tutorial are fixed: all images share one class token, so that a prediction does not depend on the
    batch; and tokens and positions are initialised by a truncated normal distribution of standard deviation 0.02.

    Raises:
        ValueError: if ``config.num_classes`` or ``config.channels`` is ``None``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_classes is None or config.channels is None:
            raise ValueError("ViT needs num_classes and channels")
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.channels = config.channels
        D = config.embed_dim
        self.side = config.image_size // config.patch_size  # number of patches along a side of the image
        self.patch_embed = register.patch_embed.build(config.patch_embed, config.options, config)
        self.first = int(getattr(register.pool[config.pool], "class_token", False))  # tokens before the patches
        self.cls_token = learned_tokens(self.first, D)
        self.registers = learned_tokens(config.registers, D)
        self.pos_embed = learned_tokens(self.first + self.side**2 if config.position == "learned" else 0, D)
        self.rotary = (D // config.heads, self.first, config.registers) if config.position == "rotary" else None
        angles = None if self.rotary is None else rotary_angles(self.side, *self.rotary)
        self.register_buffer("rotation", angles, persistent=False)
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()  # rises with depth
        self.blocks = nn.ModuleList(register.block.build(config.block, config.options, config, rate) for rate in rates)
        last = self.blocks[-1]
        final_norm = getattr(last, "final_norm", True) and getattr(register.pool[config.pool], "final_norm", True)
        self.norm = nn.LayerNorm(D, eps=config.norm_eps) if final_norm else nn.Identity()
        self.takes = inspect.signature(last.forward).parameters.keys() & {"queries", "rotation"}
        if self.rotary is not None and "rotation" not in self.takes:
            raise InputError(f"model.position=rotary needs a block whose forward takes rotation, not {config.block}")
        self.pool = register.pool.build(config.pool, config.options, D)
        self.head = mlp_head(D, config.mlp_head_units, config.num_classes, config.head_dropout)
        self.register_load_state_dict_pre_hook(upgrade_state)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, num_classes) of normalised images; sizes as for :meth:`forward_features`."""
        return self.head(self.pool(self.forward_features(images)))

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the tokens that are pooled, after the final norm.

        Args:
            images: (B, C, s, s), where s is a multiple of P; positions are resized if it is not S.

        Returns:
            (B, 1, D) with a class token, else (B, (s / P)², D).
        """
        x = self.patch_embed(images)  # (B, patches, D)
        side = images.shape[-1] // self.patch_size
        rotation = self.rotation
        if self.rotary is not None and side != self.side:
            rotation = rotary_angles(side, *self.rotary).to(x.device)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, side, self.first)
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], dim=1)  # (B, N, D)
        more: dict[str, Any] = {"rotation": rotation} if self.rotary is not None else {}
        for block in self.blocks[:-1]:
            x = block(x, **more)  # (B, N, D)
        # If it can, the last block computes only the tokens that are pooled: the class token, or else the patches.
        pooled = self.first or side**2
        if "queries" in self.takes and pooled < x.shape[1]:
            more["queries"] = pooled
        return self.norm(self.blocks[-1](x, **more)[:, :pooled])  # (B, pooled, D)

    def muon_matrices(self) -> list[Tensor]:
        """Return the weights to train with Muon: the stem's 3 × 3 convolutions and the blocks' linear layers."""
        convolutions = [m for m in self.patch_embed.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        linear = [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        return [*(m.weight for m in convolutions), *(m.weight for m in linear)]


def upgrade_state(net: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict of earlier versions: ``pool`` was ``attention_pool``, convolutions were (out, in · 9)."""
    ndim = {name: parameter.ndim for name, parameter in net.named_parameters(prefix.removesuffix("."))}
    for old in [name for name in state_dict if name.startswith(prefix)]:
        name = old.replace(f"{prefix}attention_pool.", f"{prefix}pool.")
        value = state_dict.pop(old)
        state_dict[name] = value.unflatten(1, (-1, 3, 3)) if value.ndim == 2 and ndim.get(name) == 4 else value
