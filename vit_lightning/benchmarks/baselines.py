"""The benchmark's baselines: the tutorial's script, written plainly from its description, and other libraries.

The tutorial's network is that of ``model=vit``, implemented as in the tutorial: :class:`torch.nn.MultiheadAttention`
that returns unused weights, a last block that computes every token, and stock dropout. Images go one at a time through
PIL transforms in loader workers. Axes as in :mod:`vit_lightning.model.vit`.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.models import VisionTransformer
from torchvision.transforms.functional import to_pil_image

from vit_lightning.config import ModelConfig


class TutorialBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.MultiheadAttention(D, config.heads, batch_first=True)
        self.drop = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(D, config.mlp_dim), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.mlp_dim, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        a = self.norm1(x)
        a, _ = self.attn(a, a, a, need_weights=True)
        x = x + self.drop(a)
        return x + self.mlp(self.norm2(x))


class TutorialViT(nn.Module):
    """The pre-norm network, layer by layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.channels is not None
        D, P = config.embed_dim, config.patch_size
        patches = (config.image_size // P) ** 2
        self.unfold = nn.Unfold(kernel_size=P, stride=P)
        self.patch_embed = nn.Linear(config.channels * P * P, D)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, D))
        self.blocks = nn.Sequential(*(TutorialBlock(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = stock_head(config)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, S, S) to logits (B, num_classes)."""
        x = self.patch_embed(self.unfold(images).transpose(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def stock_head(config: ModelConfig) -> nn.Sequential:
    """The MLP head with :class:`torch.nn.Dropout`."""
    assert config.num_classes is not None
    layers: list[nn.Module] = []
    dim = config.embed_dim
    for width in config.mlp_head_units:
        layers += [nn.Linear(dim, width), nn.GELU(), nn.Dropout(config.head_dropout)]
        dim = width
    return nn.Sequential(*layers, nn.Linear(dim, config.num_classes))


class TutorialImages(Dataset):
    """One image at a time: resized, rotated within ±7°, flipped half of the time, scaled to [0, 1], normalised.

    Args:
        images: uint8 of shape (n, C, h, w).
        labels: int64 of shape (n,).
        size: S, in pixels.
        mean: mean of each channel, in [0, 1].
        std: the standard deviation of each channel, likewise.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int, mean: list[float], std: list[float]) -> None:
        self.images = images
        self.labels = labels
        steps = [transforms.Resize((size, size)), transforms.RandomRotation(7), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), int(self.labels[index])


def installed(channels: int) -> list[str]:
    """Names of the installed libraries that have a Vision Transformer for images with this number of channels."""
    modules = {"timm": "timm", "vit-pytorch": "vit_pytorch", "Hugging Face": "transformers"}
    return ["torchvision"] * (channels == 3) + [name for name, module in modules.items() if find_spec(module)]


def library(name: str, config: ModelConfig) -> nn.Module:
    """Build the Vision Transformer of an :func:`installed` library, with the same shape and the same head.

    ``config.dropout`` is the probability of every dropout inside, whose places differ: all libraries drop after the
    attention and after the second MLP layer, all but Hugging Face between the two MLP layers, torchvision and Hugging
    Face also the embeddings, and vit-pytorch the attention weights.
    """
    S, P, C, D = config.image_size, config.patch_size, config.channels, config.embed_dim
    layers, heads, M, p = config.layers, config.heads, config.mlp_dim, config.dropout
    assert C is not None
    net: Any
    if name == "torchvision":
        net = VisionTransformer(S, P, layers, heads, D, M, dropout=p)
        net.heads = stock_head(config)
    elif name == "timm":
        from timm.models.vision_transformer import VisionTransformer as TimmViT

        net = TimmViT(S, P, C, embed_dim=D, depth=layers, num_heads=heads, mlp_ratio=M / D, proj_drop_rate=p)
        net.head = stock_head(config)
    elif name == "vit-pytorch":
        from vit_pytorch import ViT

        blocks: dict[str, Any] = dict(depth=layers, heads=heads, dim_head=D // heads, mlp_dim=M, dropout=p)
        net = ViT(image_size=S, patch_size=P, channels=C, num_classes=1, dim=D, **blocks)
        net.mlp_head = stock_head(config)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        widths: dict[str, Any] = dict(hidden_size=D, intermediate_size=M, num_attention_heads=heads)
        images: dict[str, Any] = dict(image_size=S, patch_size=P, num_channels=C)
        shape = ViTConfig(**images, **widths, num_hidden_layers=layers, hidden_dropout_prob=p)
        net = ViTForImageClassification(shape)
        net.classifier = stock_head(config)
    return net
