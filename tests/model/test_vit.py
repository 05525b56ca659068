"""The network, against implementations that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from vit_lightning.config import ModelConfig
from vit_lightning.model.vit import (
    Attention,
    AttentionPool,
    BlogBlock,
    ConvStem,
    Dropout,
    PreNormBlock,
    ViT,
    mlp_head,
    patchify,
    resize_positions,
    rotary_angles,
    rotate,
)


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


def test_attention_in_bfloat16_equals_torch():
    """On a CPU this precision has a path of its own."""
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


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("registers", [0, 3])
def test_the_last_block_leaves_out_only_what_nobody_reads(pool, position, registers):
    """The same network, written with every token through every block."""
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
        x = torch.einsum("bn,bnd->bd", net.attention_pool.score(x[:, :9]).squeeze(-1).softmax(-1), x[:, :9])
    torch.testing.assert_close(net(images), net.head(x))


def test_a_mean_of_tokens_has_no_class_token():
    assert not [name for name in ViT(small_config(pool="mean")).state_dict() if "cls" in name]
    assert ViT(small_config(pool="mean")).pos_embed.shape == (1, 9, 22)


def test_attention_pool_is_a_mean_at_first_and_picks_what_scores():
    torch.manual_seed(0)
    pool, x = AttentionPool(6), torch.randn(5, 11, 6)
    nn.init.zeros_(pool.score.weight)
    torch.testing.assert_close(pool(x), x.mean(dim=1))
    nn.init.constant_(pool.score.weight, 1000.0)
    torch.testing.assert_close(pool(x), x[torch.arange(5), x.sum(-1).argmax(1)])


@pytest.mark.parametrize(("depth", "se"), [(0, False), (2, False), ([1, 2], True)])
def test_conv_stem_follows_its_stages(depth, se):
    torch.manual_seed(0)
    stem = randomise(ConvStem(3, 8, 20, depth, se)).eval()
    assert [stage[0].out_features for stage in stem] == [5, 10, 20]
    assert [len(stage) - 4 for stage in stem] == ([*depth, 0] if isinstance(depth, list) else [depth, depth, 0])
    images = torch.randn(2, 3, 32, 32)

    def normed(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
        return F.gelu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    x = images
    for conv, _, norm, _, *residual in stem:
        x = normed(F.max_pool2d(F.conv2d(x, conv.weight.view(len(conv.weight), -1, 3, 3), padding=1), 2), norm)
        for part in residual:
            weight = part[0].weight.view(x.shape[1], x.shape[1], 3, 3)
            y = normed(F.conv2d(x, weight, padding=1), part[1])
            if se:
                squeezed = y.mean(dim=(2, 3))
                hidden = F.relu(F.linear(squeezed, part[3].fc1.weight.flatten(1), part[3].fc1.bias))
                excited = F.linear(hidden, part[3].fc2.weight.flatten(1), part[3].fc2.bias).sigmoid()
                y = y * excited[:, :, None, None]
            x = x + y
    assert x.shape == (2, 20, 4, 4)
    tokens = stem(images)
    torch.testing.assert_close(tokens, torch.einsum("bdyx->byxd", x).reshape(2, 16, 20), rtol=1e-4, atol=1e-4)


def test_rotary_turns_pairs_of_channels_by_the_place_of_the_patch():
    """Against complex numbers, as the paper writes it."""
    torch.manual_seed(0)
    side, K = 3, 8
    x = torch.randn(2, 4, 1 + side**2 + 2, K)
    rotated = rotate(x, rotary_angles(side, K, first=1, last=2))
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])  # class token
    torch.testing.assert_close(rotated[:, :, -2:], x[:, :, -2:])  # registers
    for token in range(side**2):
        row, column = divmod(token, side)
        for pair, angle in enumerate([column, column / 10, row, row / 10]):  # 100 ** (-1 / 2) is a tenth
            before = torch.complex(x[..., 1 + token, pair], x[..., 1 + token, pair + K // 2])
            after = torch.complex(rotated[..., 1 + token, pair], rotated[..., 1 + token, pair + K // 2])
            torch.testing.assert_close(after, before * torch.exp(torch.tensor(1j * angle)))


def test_rotary_attention_sees_only_how_far_patches_are_apart():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)
    rotation = rotary_angles(5, 8, first=0, last=0)
    scores = rotate(q.expand(1, 1, 25, 8), rotation) @ rotate(k.expand(1, 1, 25, 8), rotation).transpose(-1, -2)
    scores = scores.view(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 2, 4, 4])
    torch.testing.assert_close(scores[4, 1, 2, 3], scores[2, 0, 0, 2])


def test_zero_init_makes_every_block_the_identity_at_first():
    torch.manual_seed(0)
    net = ViT(small_config(zero_init=True))
    x = torch.randn(5, 10, 22)
    for block in net.blocks:
        assert torch.equal(block(x), x)


def test_layer_scale_scales_the_branches():
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


def test_drop_path_leaves_out_branches_of_single_images_more_often_with_depth():
    torch.manual_seed(0)
    net = ViT(small_config(drop_path=0.5, dropout=0.0))
    x = torch.randn(2000, 2, 22)
    shares = []
    for block in net.blocks:
        untouched = (block(x) == x).all(dim=2)  # both branches left out
        assert torch.equal(untouched[:, 0], untouched[:, 1])  # of an image, for all of its tokens
        shares.append(untouched[:, 0].float().mean().item())
    assert shares == pytest.approx([0, 0.25**2, 0.5**2], abs=0.04)
    assert torch.equal(net.eval().blocks[-1](x), net.blocks[-1](x))


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


@pytest.mark.parametrize(
    "changes",
    [
        {"block": "prenorm"},
        {"block": "blog"},
        {"patch_embed": "conv", "patch_size": 4, "image_size": 16, "pool": "attention", "registers": 2},
        {"position": "rotary", "embed_dim": 24, "pool": "mean", "layer_scale": 0.1},
    ],
)
def test_every_parameter_learns(changes):
    torch.manual_seed(0)
    net = ViT(small_config(**changes))
    side = net.image_size
    F.cross_entropy(net(torch.randn(5, 3, side, side)), torch.arange(5)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("missing", ["channels", "num_classes"])
def test_network_without_sizes_is_refused(missing):
    with pytest.raises(ValueError, match="needs its num_classes and channels"):
        ViT(small_config(**{missing: None}))


@pytest.mark.parametrize("model", [{"pool": "cls"}, {"pool": "mean", "registers": 2}, {"position": "rotary"}])
def test_other_sizes_of_images_are_those_of_a_network_with_resized_positions(model):
    torch.manual_seed(0)
    large, small = (
        ViT(
            ModelConfig(image_size=size, patch_size=3, channels=1, num_classes=5, embed_dim=16, layers=2, **model)
        ).eval()
        for size in (12, 6)
    )
    state = large.state_dict()
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], 2, first=int(large.pool == "cls"))
    small.load_state_dict(state)
    images = torch.randn(3, 1, 6, 6)
    torch.testing.assert_close(large(images), small(images))
