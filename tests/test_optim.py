"""Parameter groups, AdamW and schedules, against torch.optim."""

import pytest
import torch
from torch import nn

from vit_lightning.config import ModelConfig, OptimConfig
from vit_lightning.model import ViT
from vit_lightning.optim import build_optimizer, build_schedule

SMALL = ModelConfig(image_size=6, patch_size=3, channels=1, num_classes=5, embed_dim=8, layers=2, mlp_head_units=[7])


def decays(net: nn.Module, config: OptimConfig) -> dict[str, float]:
    names = {id(p): name for name, p in net.named_parameters()}
    groups = build_optimizer(net, config).param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_only_matrices_decay_unless_asked():
    net = ViT(SMALL)
    some = decays(net, OptimConfig(weight_decay=0.1))
    assert some.keys() == dict(net.named_parameters()).keys()
    undecayed = {name for name, decay in some.items() if decay == 0}
    assert undecayed == {n for n in some if n.endswith("bias") or "norm" in n or n in ("cls_token", "pos_embed")}
    assert set(decays(net, OptimConfig(weight_decay=0.1, decay_all=True)).values()) == {0.1}


def test_steps_are_those_of_plain_adamw():
    config = OptimConfig(lr=0.01, weight_decay=0.1, betas=[0.8, 0.95], decay_all=True)
    nets = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        plain = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), foreach=False)
        optimizer = build_optimizer(net, config) if fused else plain
        for step in range(20):
            optimizer.zero_grad()
            (net(torch.full((2, 5), step / 10.0)) ** 2).sum().backward()
            optimizer.step()
        nets.append(net)
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-5, atol=1e-6)


def rates(config: OptimConfig, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, steps)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_constant_is_constant():
    assert rates(OptimConfig(lr=0.5), 7) == [0.5] * 7


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    assert rates(OptimConfig(lr=0.5, schedule="cosine"), 20) == pytest.approx(expected)


def test_warmup_rises_linearly_to_the_peak():
    values = rates(OptimConfig(lr=1.0, schedule="cosine", warmup=0.2), 20)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[4] == 1.0
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] < 0.02
