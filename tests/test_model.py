"""The network, against implementations that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from vit_lightning.config import ModelConfig
from vit_lightning.model import Attention, BlogBlock, Dropout, PreNormBlock, ViT, mlp_head, patchify


def spec_config(**changes) -> ModelConfig:
    return ModelConfig(**{"channels": 3, "num_classes": 100, **changes})


def small_config(**changes) -> ModelConfig:
    """Sizes without common factors, so that swapped axes show."""
    sizes = dict(image_size=15, patch_size=5, channels=3, num_classes=7, embed_dim=22, heads=2, layers=3, mlp_dim=13)
    return ModelConfig(**{**sizes, "mlp_head_units": [17, 19], **changes})


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter a value that matters; norms and biases begin at ones and zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(("block", "parameters"), [("prenorm", 2_618_020), ("blog", 2_618_916)])
def test_parameter_counts_are_the_specs(block, parameters):
    assert sum(p.numel() for p in ViT(spec_config(block=block)).parameters()) == parameters


def test_attention_equals_torch():
    torch.manual_seed(0)
    ours, theirs = randomise(Attention(22, 2)), nn.MultiheadAttention(22, 2, batch_first=True)
    copy_attention(ours, theirs)
    x = torch.randn(5, 11, 22)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=True)[0], rtol=1e-5, atol=1e-5)


def test_attention_starts_like_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(64, 4), nn.MultiheadAttention(64, 4)
    assert ours.qkv.weight.abs().max().item() == pytest.approx(theirs.in_proj_weight.abs().max().item(), rel=1e-2)
    assert ours.qkv.weight.std().item() == pytest.approx(theirs.in_proj_weight.std().item(), rel=5e-2)
    assert not ours.qkv.bias.any()
    assert not ours.proj.bias.any()


def torchvision_twin(ours: ViT, config: ModelConfig) -> VisionTransformer:
    theirs = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.layers,
        num_heads=config.heads,
        hidden_dim=config.embed_dim,
        mlp_dim=config.mlp_dim,
        num_classes=config.num_classes,
    ).eval()
    with torch.no_grad():
        theirs.class_token.copy_(ours.cls_token)
        theirs.encoder.pos_embedding.copy_(ours.pos_embed)
        theirs.conv_proj.weight.copy_(ours.patch_embed.weight.view_as(theirs.conv_proj.weight))
        theirs.conv_proj.bias.copy_(ours.patch_embed.bias)
        for our_block, their_block in zip(ours.blocks, theirs.encoder.layers, strict=True):
            copy_attention(our_block.attn, their_block.self_attention)
            their_block.ln_1.load_state_dict(our_block.norm1.state_dict())
            their_block.ln_2.load_state_dict(our_block.norm2.state_dict())
            their_block.mlp[0].load_state_dict(our_block.mlp[0].state_dict())
            their_block.mlp[3].load_state_dict(our_block.mlp[3].state_dict())
        theirs.encoder.ln.load_state_dict(ours.norm.state_dict())
    theirs.heads = ours.head
    return theirs


@pytest.mark.parametrize("head", [[17, 19], []])
def test_prenorm_network_equals_torchvision_in_value_and_gradient(head):
    torch.manual_seed(0)
    config = small_config(mlp_head_units=head)
    ours = randomise(ViT(config)).eval()
    theirs = torchvision_twin(ours, config)
    images = torch.randn(5, 3, 15, 15)
    logits, their_logits = ours(images), theirs(images)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)

    labels = torch.tensor([0, 6, 2, 3, 1])
    [ours_grad] = torch.autograd.grad(F.cross_entropy(logits, labels), ours.pos_embed)
    [theirs_grad] = torch.autograd.grad(F.cross_entropy(their_logits, labels), theirs.encoder.pos_embedding)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-5)


def test_network_at_the_specs_constants_equals_torchvision():
    torch.manual_seed(0)
    config = spec_config()
    ours = ViT(config).eval()
    images = torch.randn(2, 3, 72, 72)
    torch.testing.assert_close(ours(images), torchvision_twin(ours, config)(images), rtol=1e-5, atol=1e-5)


def test_blog_block_follows_the_tutorials_equations():
    torch.manual_seed(0)
    config = small_config(block="blog")
    block = randomise(BlogBlock(config)).eval()
    attention = nn.MultiheadAttention(22, 2, batch_first=True)
    copy_attention(block.attn, attention)

    def norm(x, layer):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * layer.weight + (
            layer.bias
        )

    x = torch.randn(5, 11, 22)
    a = norm(x, block.norm_in)
    h = norm(x + attention(a, a, a)[0], block.norm_1)
    ffn = F.gelu(F.linear(h, block.ffn[0].weight, block.ffn[0].bias))
    ffn = F.gelu(F.linear(ffn, block.ffn[3].weight, block.ffn[3].bias))
    torch.testing.assert_close(block(x), norm(h + ffn, block.norm_2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [PreNormBlock, BlogBlock])
def test_a_block_for_the_class_token_alone_is_exact_in_value_and_gradient(block):
    torch.manual_seed(0)
    layer = randomise(block(small_config(dropout=0.0))).double()
    x = torch.randn(5, 11, 22, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    full, short = layer(x)[:, :1], layer(x, queries=1)
    assert short.shape == (5, 1, 22)
    torch.testing.assert_close(short, full)
    weights = torch.randn_like(full)
    for one, other in zip(
        torch.autograd.grad((full * weights).sum(), parameters),
        torch.autograd.grad((short * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_dropout_drops_its_share_keeps_the_mean_and_repeats_with_the_seed():
    x = torch.ones(1000, 1001, 3)
    for p in (0.1, 0.5, 0.9):
        drop = Dropout(p)
        torch.manual_seed(0)
        y = drop(x)
        torch.manual_seed(0)
        assert torch.equal(drop(x), y)
        assert not torch.equal(drop(x), y)
        values = y.unique()
        assert values.tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
        # 3 million draws: five standard deviations of the share that is dropped.
        assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
        # Exactly unbiased: the kept share times its scale is one.
        dropped = round(p * 2**16) / 2**16
        assert values[1].item() * (1 - dropped) == pytest.approx(1, abs=1e-6)


def test_dropouts_mask_values_of_one_word_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(250_000, 4)) > 0).double()
    correlation = torch.corrcoef(torch.cat([kept, kept.roll(1, 0)], dim=1).T)
    assert (correlation - torch.eye(8)).abs().max() < 0.01


def test_dropouts_gradient_is_its_mask():
    torch.manual_seed(0)
    x = torch.randn(7, 5, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


def test_dropout_is_off_in_evaluation():
    x = torch.randn(7, 5)
    assert torch.equal(Dropout(0.4).eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dropout_in_other_precisions(dtype):
    torch.manual_seed(0)
    x = torch.ones(100_000, dtype=dtype)
    out = Dropout(0.4)(x)
    assert out.dtype == dtype
    assert (out == 0).double().mean().item() == pytest.approx(0.4, abs=0.01)
    assert out.max().item() == pytest.approx(1 / 0.6, rel=torch.finfo(dtype).eps + 2**-15)


@pytest.mark.parametrize(("block", "dropouts"), [("prenorm", 2), ("blog", 3)])
def test_dropout_stands_where_the_spec_has_it(block, dropouts):
    net = ViT(small_config(block=block, dropout=0.25, head_dropout=0.75))
    in_block = [m.p for m in net.blocks[0].modules() if isinstance(m, nn.Dropout)]
    in_head = [m.p for m in net.head.modules() if isinstance(m, nn.Dropout)]
    assert in_block == [0.25] * dropouts
    assert in_head == [0.75] * 2


def test_patches_are_row_major_and_channel_major_inside():
    images = torch.arange(2 * 3 * 15 * 15.0).view(2, 3, 15, 15)
    patches = patchify(images, 5)
    assert patches.shape == (2, 9, 75)
    for row in range(3):
        for column in range(3):
            expected = images[:, :, row * 5 : row * 5 + 5, column * 5 : column * 5 + 5].flatten(1)
            assert torch.equal(patches[:, row * 3 + column], expected)


@pytest.mark.parametrize("block", ["prenorm", "blog"])
def test_a_prediction_does_not_depend_on_the_batch(block):
    torch.manual_seed(0)
    net = ViT(small_config(block=block)).eval()
    images = torch.randn(7, 3, 15, 15)
    together = net(images)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(images.flip(0)).flip(0), together, rtol=1e-5, atol=1e-6)


def test_one_class_token_and_small_embeddings():
    net = ViT(spec_config())
    assert net.cls_token.shape == (1, 1, 64)
    assert net.pos_embed.shape == (1, 145, 64)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.cls_token.abs().max() < 0.2


def test_channels_follow_the_config():
    assert ViT(small_config(channels=1))(torch.randn(2, 1, 15, 15)).shape == (2, 7)


def test_head_without_units_is_linear():
    assert [type(layer) for layer in mlp_head(22, [], 7, 0.5)] == [nn.Linear]


@pytest.mark.parametrize("block", ["prenorm", "blog"])
def test_every_parameter_learns(block):
    torch.manual_seed(0)
    net = ViT(small_config(block=block))
    F.cross_entropy(net(torch.randn(5, 3, 15, 15)), torch.arange(5)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("missing", ["channels", "num_classes"])
def test_network_without_sizes_is_refused(missing):
    with pytest.raises(ValueError, match="needs its num_classes and channels"):
        ViT(small_config(**{missing: None}))
