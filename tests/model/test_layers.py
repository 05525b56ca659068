"""The layers, against PyTorch and the formulas of the papers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vit_lightning.model.layers import AttentionPool, Dropout, mlp_head, resize_positions, rotary_angles, rotate


def test_attention_pool_weights_tokens_by_their_scores():
    torch.manual_seed(0)
    pool, x = AttentionPool(6), torch.randn(5, 11, 6)
    nn.init.zeros_(pool.score.weight)
    torch.testing.assert_close(pool(x), x.mean(dim=1))
    nn.init.constant_(pool.score.weight, 1000.0)
    torch.testing.assert_close(pool(x), x[torch.arange(5), x.sum(-1).argmax(1)])


def test_rotary_rotates_channel_pairs_by_row_and_column():
    """Against complex numbers, the notation of the paper."""
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


def test_rotary_attention_depends_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)
    rotation = rotary_angles(5, 8, first=0, last=0)
    scores = rotate(q.expand(1, 1, 25, 8), rotation) @ rotate(k.expand(1, 1, 25, 8), rotation).transpose(-1, -2)
    scores = scores.view(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 2, 4, 4])
    torch.testing.assert_close(scores[4, 1, 2, 3], scores[2, 0, 0, 2])


def test_dropout_is_unbiased_and_reproducible():
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
        # Within five standard deviations of the dropped fraction of 3 million draws.
        assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
        # Exactly unbiased: the kept fraction times its scale is one.
        dropped = round(p * 2**16) / 2**16
        assert values[1].item() * (1 - dropped) == pytest.approx(1, abs=1e-6)


def test_dropout_mask_values_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(250_000, 4)) > 0).double()
    correlation = torch.corrcoef(torch.cat([kept, kept.roll(1, 0)], dim=1).T)
    assert (correlation - torch.eye(8)).abs().max() < 0.01


def test_gradient_of_dropout_is_its_mask():
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


def test_head_without_hidden_layers_is_linear():
    assert [type(layer) for layer in mlp_head(22, [], 7, 0.5)] == [nn.Linear]


@pytest.mark.parametrize("first", [0, 1])
def test_positions_are_resized_as_an_image(first):
    torch.manual_seed(0)
    positions = torch.randn(1, first + 16, 8)
    image = positions[:, first:].transpose(1, 2).reshape(1, 8, 4, 4)
    image = F.interpolate(image, size=(6, 6), mode="bicubic", antialias=True)
    resized = resize_positions(positions, 6, first)
    assert torch.equal(resized[:, :first], positions[:, :first])
    torch.testing.assert_close(resized[:, first:], image.flatten(2).transpose(1, 2))
    assert torch.equal(resize_positions(positions, 4, first), positions)
