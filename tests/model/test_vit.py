"""The network, against implementations that are not ours."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer

from vit_lightning import register
from vit_lightning.config import ModelConfig
from vit_lightning.keys import InputError, key
from vit_lightning.model.layers import resize_positions
from vit_lightning.model.vit import Attention, BlogBlock, PreNormBlock, ViT


def default_config(**changes) -> ModelConfig:
    return ModelConfig(**{"channels": 3, "num_classes": 100, **changes})


def small_config(**changes) -> ModelConfig:
    """Sizes without common factors, so that swapped axes are noticed."""
    sizes = dict(image_size=15, patch_size=5, channels=3, num_classes=7, embed_dim=22, heads=2, layers=3, mlp_dim=13)
    return ModelConfig(**{**sizes, "mlp_head_units": [17, 19], **changes})


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter random values; norms and biases are initialised to ones and zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(("block", "parameters"), [("prenorm", 2_618_020), ("blog", 2_618_916)])
def test_default_network_has_the_tutorials_number_of_parameters(block, parameters):
    assert sum(p.numel() for p in ViT(default_config(block=block)).parameters()) == parameters


def test_attention_equals_torch():
    torch.manual_seed(0)
    ours, theirs = randomise(Attention(22, 2)), nn.MultiheadAttention(22, 2, batch_first=True)
    copy_attention(ours, theirs)
    x = torch.randn(5, 11, 22)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=True)[0], rtol=1e-5, atol=1e-5)


def test_attention_in_bfloat16_equals_torch():
    """The CPU has a separate code path for this precision."""
    torch.manual_seed(0)
    ours, theirs = randomise(Attention(22, 2)), nn.MultiheadAttention(22, 2, batch_first=True)
    copy_attention(ours, theirs)
    x = torch.randn(5, 11, 22, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(x)
    assert half.dtype == torch.bfloat16
    full = theirs(x, x, x)[0]
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    [half_grad], [full_grad] = (torch.autograd.grad(out.float().square().sum(), x) for out in (half, full))
    assert F.cosine_similarity(half_grad.flatten(), full_grad.flatten(), dim=0) > 0.99


def test_attention_is_initialised_like_torch():
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
def test_prenorm_network_and_its_gradient_equal_torchvision(head):
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


def test_default_network_equals_torchvision():
    torch.manual_seed(0)
    config = default_config()
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
def test_a_block_for_the_class_token_only_is_exact_in_value_and_gradient(block):
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


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("registers", [0, 3])
def test_the_last_block_skips_only_tokens_that_are_not_pooled(pool, position, registers):
    """Against the same network with every token passed through every block."""
    torch.manual_seed(0)
    config = small_config(
        pool=pool, position=position, registers=registers, embed_dim=24, dropout=0.0, head_dropout=0.0, layer_scale=0.5
    )
    net = randomise(ViT(config)).double()
    net.rotation = None if net.rotation is None else net.rotation.double()
    images = torch.randn(5, 3, 15, 15, dtype=torch.float64)
    x = net.patch_embed(images)
    if pool == "cls":
        x = torch.cat([net.cls_token.expand(5, -1, -1), x], dim=1)
    if position == "learned":
        x = x + net.pos_embed
    if registers:
        x = torch.cat([x, net.registers.expand(5, -1, -1)], dim=1)
    assert x.shape[1] == 9 + (pool == "cls") + registers
    for block in net.blocks:
        x = block(x, rotation=net.rotation)
    x = net.norm(x)
    if pool == "cls":
        x = x[:, 0]
    elif pool == "mean":
        x = x[:, :9].mean(dim=1)
    else:
        x = torch.einsum("bn,bnd->bd", net.pool.score(x[:, :9]).squeeze(-1).softmax(-1), x[:, :9])
    torch.testing.assert_close(net(images), net.head(x))


def test_mean_pooling_has_no_class_token():
    assert not [name for name in ViT(small_config(pool="mean")).state_dict() if "cls" in name]
    assert ViT(small_config(pool="mean")).pos_embed.shape == (1, 9, 22)


def test_zero_init_makes_every_block_the_identity():
    torch.manual_seed(0)
    net = ViT(small_config(zero_init=True))
    x = torch.randn(5, 10, 22)
    for block in net.blocks:
        assert torch.equal(block(x), x)


def test_layer_scale_scales_the_residual_branches():
    torch.manual_seed(0)
    scaled = randomise(PreNormBlock(small_config(layer_scale=0.25, dropout=0.0)))
    plain = PreNormBlock(small_config(dropout=0.0))
    plain.load_state_dict(scaled.state_dict(), strict=False)
    with torch.no_grad():
        for scale, last in ((scaled.scale1, plain.attn.proj), (scaled.scale2, plain.mlp[-1])):
            last.weight.mul_(scale.gamma[:, None])
            last.bias.mul_(scale.gamma)
    x = torch.randn(5, 11, 22)
    torch.testing.assert_close(scaled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert ViT(small_config(layer_scale=0.25)).blocks[0].scale1.gamma.tolist() == [0.25] * 22


def test_drop_path_skips_branches_per_image_and_more_often_with_depth():
    torch.manual_seed(0)
    net = ViT(small_config(drop_path=0.5, dropout=0.0))
    x = torch.randn(2000, 2, 22)
    shares = []
    for block in net.blocks:
        untouched = (block(x) == x).all(dim=2)  # both branches were skipped
        assert torch.equal(untouched[:, 0], untouched[:, 1])  # for all tokens of an image
        shares.append(untouched[:, 0].float().mean().item())
    assert shares == pytest.approx([0, 0.25**2, 0.5**2], abs=0.04)
    assert torch.equal(net.eval().blocks[-1](x), net.blocks[-1](x))


@pytest.mark.parametrize(("block", "dropouts"), [("prenorm", 2), ("blog", 3)])
def test_number_and_probability_of_dropout_layers(block, dropouts):
    net = ViT(small_config(block=block, dropout=0.25, head_dropout=0.75))
    in_block = [m.p for m in net.blocks[0].modules() if isinstance(m, nn.Dropout)]
    in_head = [m.p for m in net.head.modules() if isinstance(m, nn.Dropout)]
    assert in_block == [0.25] * dropouts
    assert in_head == [0.75] * 2


@pytest.mark.parametrize("block", ["prenorm", "blog"])
def test_a_prediction_does_not_depend_on_the_batch(block):
    torch.manual_seed(0)
    net = ViT(small_config(block=block)).eval()
    images = torch.randn(7, 3, 15, 15)
    together = net(images)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(images.flip(0)).flip(0), together, rtol=1e-5, atol=1e-6)


def test_tokens_and_positions_are_initialised_small():
    net = ViT(default_config())
    assert net.cls_token.shape == (1, 1, 64)
    assert net.pos_embed.shape == (1, 145, 64)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.cls_token.abs().max() < 0.2


def test_number_of_channels_follows_the_config():
    assert ViT(small_config(channels=1))(torch.randn(2, 1, 15, 15)).shape == (2, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"block": "prenorm"},
        {"block": "blog"},
        {"patch_embed": "conv", "patch_size": 4, "image_size": 16, "pool": "attention", "registers": 2},
        {"position": "rotary", "embed_dim": 24, "pool": "mean", "layer_scale": 0.1},
    ],
)
def test_every_parameter_has_a_gradient(changes):
    torch.manual_seed(0)
    net = ViT(small_config(**changes))
    side = net.image_size
    F.cross_entropy(net(torch.randn(5, 3, side, side)), torch.arange(5)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("missing", ["channels", "num_classes"])
def test_missing_number_of_classes_or_channels_is_an_error(missing):
    with pytest.raises(ValueError, match="needs num_classes and channels"):
        ViT(small_config(**{missing: None}))


@pytest.mark.parametrize("model", [{"pool": "cls"}, {"pool": "mean", "registers": 2}, {"position": "rotary"}])
def test_images_of_another_size_resize_the_positions(model):
    torch.manual_seed(0)
    large, small = (
        ViT(
            ModelConfig(image_size=size, patch_size=3, channels=1, num_classes=5, embed_dim=16, layers=2, **model)
        ).eval()
        for size in (12, 6)
    )
    state = large.state_dict()
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], 2, large.first)
    small.load_state_dict(state)
    images = torch.randn(3, 1, 6, 6)
    torch.testing.assert_close(large(images), small(images))


@pytest.fixture
def scaling(registries) -> None:
    @register.block("scaling", by=key(2.0, "Factor.", above=0))
    class Scaling(nn.Module):
        def __init__(self, config, drop_path, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return self.by * x


@pytest.mark.usefixtures("scaling")
def test_a_norm_follows_the_last_block_unless_the_block_declines_it():
    """A registered block needs to take nothing but tokens, and gets the final norm without mentioning it."""
    net = ViT(small_config(block="scaling", options={"scaling": {"by": 3}}, mlp_head_units=[]))
    assert [block.by for block in net.blocks] == [3] * len(net.blocks)
    net.head = nn.Identity()
    torch.testing.assert_close(
        net(torch.randn(5, 3, 15, 15)).std(dim=1, correction=0), torch.ones(5), rtol=0.01, atol=0
    )
    assert isinstance(ViT(small_config(block="blog")).norm, nn.Identity)


@pytest.mark.usefixtures("scaling")
def test_rotary_positions_need_a_block_that_rotates():
    with pytest.raises(InputError, match="position=rotary needs a block whose forward takes rotation, not scaling"):
        ViT(small_config(block="scaling", position="rotary", embed_dim=16, heads=4))


@pytest.mark.usefixtures("scaling")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": {"by": 0.0}}, "model.options.scaling.by=0.0 must be greater than 0"),
        ({"scaling": {"by": "a"}}, "model.options.scaling.by=a must be of type float"),
        ({"scaling": {"by": True}}, "model.options.scaling.by=True must be of type float"),
        ({"scaling": {"to": 1.0}}, "model.options.scaling.to is not a setting of scaling; it has by"),
        ({"scaling": 3}, "model.options.scaling=3 must be a mapping of settings, as in model.options.scaling.x=1"),
        ({"blog": {"by": 1.0}}, "model.options.blog.by is not a setting of blog; it has no settings"),
        ({"mystery": {}}, "model.options.mystery is not a registered part"),
    ],
)
def test_settings_of_registered_parts_are_checked(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        small_config(block="scaling", options=options)


def test_states_of_earlier_versions_are_loaded():
    """Convolutions were saved as matrices, and the attention pool under another name."""
    torch.manual_seed(0)
    config = small_config(
        patch_embed="conv", patch_size=4, image_size=16, pool="attention", stem_depth=1, stem_se=True, embed_dim=24
    )
    trained, net, nested = randomise(ViT(config)).eval(), ViT(config).eval(), AveragedModel(ViT(config)).eval()
    state = {}
    for name, value in trained.state_dict().items():
        matrix = value.ndim == 4 and value.shape[-1] == 3
        state[name.replace("pool.score", "attention_pool.score")] = value.flatten(1) if matrix else value
    assert sum(value.ndim == 4 for value in state.values()) == 2  # squeeze-and-excitation
    net.load_state_dict(state)
    nested.load_state_dict({"n_averaged": torch.tensor(3), **{f"module.{name}": v for name, v in state.items()}})
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(net(images), trained(images))
    assert torch.equal(nested(images), trained(images))
