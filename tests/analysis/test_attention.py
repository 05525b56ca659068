"""Attention maps against torch.nn.MultiheadAttention, the rollout against its definition."""

import pytest
import torch
from torch import nn

from vit_lightning.analysis.attention import attention_maps, attention_rollout, on_patches, position_similarity
from vit_lightning.config import ModelConfig
from vit_lightning.model.vit import ViT


def network(**changes) -> ViT:
    torch.manual_seed(0)
    config = dict(image_size=9, patch_size=3, channels=3, num_classes=7, embed_dim=20, heads=5, layers=3, mlp_dim=11)
    net = ViT(ModelConfig(**{**config, "mlp_head_units": [], **changes}))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.eval()


@pytest.mark.parametrize(
    "changes", [{}, {"pool": "mean", "registers": 2}, {"position": "rotary"}, {"block": "blog"}, {"pool": "attention"}]
)
def test_maps_are_distributions_over_all_tokens_and_leave_the_output_alone(changes):
    net, images = network(**changes), torch.randn(2, 3, 9, 9)
    before = net(images)
    maps = attention_maps(net, images)
    tokens = 9 + net.first + changes.get("registers", 0)
    assert maps.shape == (2, 3, 5, tokens, tokens)
    assert not maps.requires_grad
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 5, tokens))
    assert torch.equal(net(images), before)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_maps_are_those_of_torchs_attention():
    net, images = network(), torch.randn(2, 3, 9, 9)
    maps = attention_maps(net, images)
    x = net.patch_embed(images)
    x = torch.cat([net.cls_token.expand(2, -1, -1), x], dim=1) + net.pos_embed
    for layer, block in enumerate(net.blocks):
        theirs = nn.MultiheadAttention(20, 5, batch_first=True).eval()
        with torch.no_grad():
            theirs.in_proj_weight.copy_(block.attn.qkv.weight)
            theirs.in_proj_bias.copy_(block.attn.qkv.bias)
        a = block.norm1(x)
        _, weights = theirs(a, a, a, average_attn_weights=False)
        torch.testing.assert_close(maps[:, layer], weights)
        x = block(x)


def test_with_rotary_positions_the_maps_are_those_that_make_the_output():
    net, images = network(position="rotary", layers=1), torch.randn(2, 3, 9, 9)
    [maps] = attention_maps(net, images).unbind(dim=1)  # (B, H, N, N)
    seen = []
    net.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    net(images)
    [(x, output)] = seen
    attn = net.blocks[0].attn
    v = attn.qkv(x).view(2, 10, 3, 5, 4)[:, :, 2].transpose(1, 2)  # (B, H, N, K)
    by_hand = attn.proj((maps @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_hand[:, : output.shape[1]], output)


def test_a_block_may_call_its_attention_in_its_own_way():
    net, images = network(pool="mean", position="rotary"), torch.randn(2, 3, 9, 9)
    expected = attention_maps(net, images)

    class OwnBlock(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x, queries=None, rotation=None):
            x = x + self.block.attn(self.block.norm1(x), rotation=rotation)
            return x + self.block.mlp(self.block.norm2(x))

    net.blocks = nn.ModuleList(OwnBlock(block) for block in net.blocks)
    torch.testing.assert_close(attention_maps(net, images), expected)
    net.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="no attention to show"):
        attention_maps(net, images)


def test_in_training_mode_there_are_no_maps():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        attention_maps(network().train(), torch.randn(1, 3, 9, 9))


def test_rollout_multiplies_the_layers_with_the_residual():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 5, 4, 4).softmax(dim=-1)
    rollout = attention_rollout(maps)
    for image in range(2):
        expected = torch.eye(4)
        for layer in range(3):
            expected = (0.5 * maps[image, layer].mean(dim=0) + 0.5 * torch.eye(4)) @ expected
        torch.testing.assert_close(rollout[image], expected)
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones(2, 4))


def test_attention_on_patches_is_the_class_tokens_row_or_the_patches_mean():
    torch.manual_seed(0)
    attention = torch.rand(2, 12, 12)
    cls = on_patches(network(registers=2), attention)
    assert torch.equal(cls.flatten(1), attention[:, 0, 1:10])
    for pool in ("mean", "attention"):
        mean = on_patches(network(pool=pool, registers=3), attention)
        torch.testing.assert_close(mean.flatten(1), attention[:, :9, :9].mean(dim=1))
    assert mean.shape == (2, 3, 3)


def test_positions_are_compared_by_their_cosine():
    net = network(registers=2)
    similarity = position_similarity(net)
    assert similarity.shape == (3, 3, 3, 3)
    one, other = net.pos_embed[0, 1 + 3 * 2 + 1], net.pos_embed[0, 1 + 3 * 0 + 2]
    torch.testing.assert_close(similarity[2, 1, 0, 2], torch.cosine_similarity(one, other, dim=0))
    with pytest.raises(ValueError, match="rotary has no position embeddings"):
        position_similarity(network(position="rotary"))
