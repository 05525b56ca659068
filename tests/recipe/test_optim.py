"""Parameter groups, AdamW and schedules, against torch.optim."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vit_lightning.config import ModelConfig, OptimConfig
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.optim import FullPrecisionMuon, build_optimizer, build_schedule, ema_update

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


def test_in_mixed_precision_gradients_may_be_clipped():
    net = nn.Linear(5, 3)
    optimizer = build_optimizer(net, OptimConfig())
    net(torch.ones(2, 5)).sum().backward()
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 0.01)  # 16-mixed is for GPUs; both ask the optimizer
    assert torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item() == pytest.approx(0.01, rel=1e-3)


def batch_loss(net: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 1, net.image_size, net.image_size, generator=generator)
    return nn.functional.cross_entropy(net(images), torch.arange(4))


@pytest.mark.parametrize("model", [SMALL, replace(SMALL, image_size=8, patch_embed="conv", patch_size=4, stem_depth=1)])
def test_muon_takes_the_matrices_of_blocks_and_stem_and_adamw_the_rest(model, monkeypatch):
    """Against two optimizers of torch's, each stepping by itself."""
    monkeypatch.setattr("vit_lightning.recipe.optim.has_fast_bfloat16", lambda device: True)
    config = OptimConfig(name="muon", lr=0.01, muon_lr=0.05, ns_steps=3, weight_decay=0.1)
    nets = []
    for joined in (True, False):
        torch.manual_seed(0)
        net = ViT(model)
        stem = [m for m in net.patch_embed.children() for m in m.modules() if isinstance(m, nn.Linear)]
        linear = [*stem, *(m for m in net.blocks.modules() if isinstance(m, nn.Linear))]
        assert len(linear) == len(stem) + 2 * 4
        matrices = {m.weight for m in linear}
        decay = [m.weight for m in (net.patch_embed, *net.head) if isinstance(m, nn.Linear)]
        rest = [p for p in net.parameters() if p not in matrices and not any(p is one for one in decay)]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        apart = [
            torch.optim.AdamW(groups, lr=0.01, fused=True),
            torch.optim.Muon([m.weight for m in linear], lr=0.05, weight_decay=0.1, ns_steps=3),
        ]
        optimizers = [build_optimizer(net, config)] if joined else apart
        net.eval()  # without dropout
        for step in range(5):
            net.zero_grad()
            batch_loss(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
        nets.append(net)
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_muon_without_bfloat16_steps_as_in_float64(shape):
    """Its update follows from the singular values of the gradient; that of torch strays from it."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    steps = {}
    for kind in (FullPrecisionMuon, torch.optim.Muon):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = gradient.clone()
        kind([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        steps[kind] = -weight.detach()
    u, s, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):  # Jordan's polynomial moves the singular values alone
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s @ vt * max(1, shape[0] / shape[1]) ** 0.5).float()
    torch.testing.assert_close(steps[FullPrecisionMuon], expected, rtol=1e-4, atol=1e-5)
    assert (steps[torch.optim.Muon] - expected).abs().max() > 1e-3


def test_joined_optimizers_resume_exactly_and_follow_a_schedule():
    config = OptimConfig(name="muon", schedule="linear", lr=0.01, muon_lr=0.05)

    def steps(net, optimizer, schedule, numbers):
        for step in numbers:
            optimizer.zero_grad()
            loss = batch_loss(net, step)
            assert optimizer.step(lambda loss=loss: (loss.backward(), loss)[1]) is loss
            schedule.step()

    torch.manual_seed(0)
    net = ViT(SMALL).eval()
    optimizer = build_optimizer(net, config)
    schedule = build_schedule(optimizer, config, 10)
    steps(net, optimizer, schedule, range(5))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.005, 0.025])

    resumed = ViT(SMALL).eval()
    resumed.load_state_dict(net.state_dict())
    other = build_optimizer(resumed, config)
    other_schedule = build_schedule(other, config, 10)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    other_schedule.load_state_dict(schedule.state_dict())
    steps(net, optimizer, schedule, range(5, 10))
    steps(resumed, other, other_schedule, range(5, 10))
    for one, two in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0, 0, 0])


def test_the_average_is_torchs_once_its_decay_has_warmed_up():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ours, theirs = (
        AveragedModel(net, use_buffers=True, multi_avg_fn=fn) for fn in (ema_update(0.5), get_ema_multi_avg_fn(0.5))
    )
    for step in range(30):
        net(torch.randn(4, 3) + step)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += torch.randn_like(parameter)
        ours.update_parameters(net)
        theirs.update_parameters(net)
        if step == 1:  # one value before: 2 / 11 of it remain
            average = ours.module[0].weight.clone()
        if step == 2:
            torch.testing.assert_close(ours.module[0].weight, average * 3 / 12 + net[0].weight * 9 / 12)
    torch.testing.assert_close(ours.module[0].weight, theirs.module[0].weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.module[1].running_mean, theirs.module[1].running_mean, rtol=1e-3, atol=1e-3)
    assert ours.module[1].num_batches_tracked == 30


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


@pytest.mark.parametrize(
    ("schedule", "torchs"),
    [
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)),
        ("linear", lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)),
    ],
)
def test_schedules_are_torchs(schedule, torchs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torchs(optimizer)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(OptimConfig(lr=0.5, schedule=schedule), 20) == pytest.approx(expected)


def test_by_time_a_schedule_is_the_same_curve_whatever_the_steps():
    config = OptimConfig(lr=0.5, schedule="cosine", warmup=0.25)
    by_step = rates(config, 20)
    clock = iter([0.0, 0.0, 0.1, 0.249, 0.5, 0.55, 0.95, 1.0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = build_schedule(optimizer, config, 20, elapsed=lambda: next(clock))
    values = []
    for _ in range(7):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert values == pytest.approx([by_step[i] for i in (0, 0, 2, 4, 10, 11, 19)])  # never above its peak
    assert optimizer.param_groups[0]["lr"] == 0


def test_warmup_rises_linearly_to_the_peak():
    values = rates(OptimConfig(lr=1.0, schedule="cosine", warmup=0.2), 20)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[4] == 1.0
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] < 0.02
