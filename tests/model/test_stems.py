"""Patch embeddings, against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vit_lightning.config import ModelConfig
from vit_lightning.model.stems import ConvStem, patchify


def conv_stem(**changes) -> ConvStem:
    sizes = dict(channels=3, image_size=32, patch_size=8, embed_dim=20, patch_embed="conv")
    return ConvStem(ModelConfig(**sizes, **changes))


@pytest.mark.parametrize(("depth", "se"), [(0, False), (2, False), ([1, 2], True)])
def test_conv_stem_equals_its_stages_written_out(depth, se):
    torch.manual_seed(0)
    stem = conv_stem(stem_depth=depth, stem_se=se).eval()
    for parameter in stem.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert [stage[0].out_channels for stage in stem] == [5, 10, 20]
    assert [len(stage) - 4 for stage in stem] == ([*depth, 0] if isinstance(depth, list) else [depth, depth, 0])
    images = torch.randn(2, 3, 32, 32)

    def norm_and_gelu(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
        return F.gelu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    x = images
    for conv, _, norm, _, *residual in stem:
        x = norm_and_gelu(F.max_pool2d(F.conv2d(x, conv.weight, padding=1), 2), norm)
        for branch in residual:
            y = norm_and_gelu(F.conv2d(x, branch[0].weight, padding=1), branch[1])
            if se:
                squeezed = y.mean(dim=(2, 3))
                hidden = F.relu(F.linear(squeezed, branch[3].fc1.weight.flatten(1), branch[3].fc1.bias))
                excited = F.linear(hidden, branch[3].fc2.weight.flatten(1), branch[3].fc2.bias).sigmoid()
                y = y * excited[:, :, None, None]
            x = x + y
    assert x.shape == (2, 20, 4, 4)
    tokens = stem(images)
    torch.testing.assert_close(tokens, torch.einsum("bdyx->byxd", x).reshape(2, 16, 20), rtol=1e-4, atol=1e-4)


def test_patches_are_row_major_and_channel_major_within():
    images = torch.arange(2 * 3 * 15 * 15.0).view(2, 3, 15, 15)
    patches = patchify(images, 5)
    assert patches.shape == (2, 9, 75)
    for row in range(3):
        for column in range(3):
            expected = images[:, :, row * 5 : row * 5 + 5, column * 5 : column * 5 + 5].flatten(1)
            assert torch.equal(patches[:, row * 3 + column], expected)
