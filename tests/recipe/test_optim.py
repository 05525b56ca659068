"""Parameter groups, optimizers and schedules, against torch.optim."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vit_lightning import register
from vit_lightning.config import ModelConfig, OptimConfig
from vit_lightning.keys import InputError, key
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.optim import Muon, build_optimizer, build_schedule, ema_update, freeze

SMALL = ModelConfig(image_size=6, patch_size=3, channels=1, num_classes=5, embed_dim=8, layers=2, mlp_head_units=[7])
CONV = replace(SMALL, image_size=8, patch_embed="conv", patch_size=4, stem_depth=1, stem_se=True)


def decays(net: ViT, config: OptimConfig) -> dict[str, float]:
    names = {id(p): name for name, p in net.named_parameters()}
    groups = build_optimizer(net, config).param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_only_weight_matrices_decay_unless_decay_all():
    net = ViT(SMALL)
    some = decays(net, OptimConfig(weight_decay=0.1))
    assert some.keys() == dict(net.named_parameters()).keys()
    undecayed = {name for name, decay in some.items() if decay == 0}
    assert undecayed == {n for n in some if n.endswith("bias") or "norm" in n or n in ("cls_token", "pos_embed")}
    assert set(decays(net, OptimConfig(weight_decay=0.1, decay_all=True)).values()) == {0.1}


def test_adamw_steps_equal_torch():
    config = OptimConfig(lr=0.01, weight_decay=0.1, betas=[0.8, 0.95], decay_all=True)
    nets = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = ViT(SMALL)
        plain = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), foreach=False)
        optimizer = build_optimizer(net, config) if ours else plain
        for _ in range(20):
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        nets.append(net)
    torch.testing.assert_close(dict(nets[0].named_parameters()), dict(nets[1].named_parameters()), rtol=1e-5, atol=1e-6)


def test_an_optimizer_of_torch_by_name_steps_as_torchs_own():
    config = OptimConfig(name="SGD", lr=0.1, weight_decay=0.01, decay_all=True, options={"SGD": {"momentum": 0.9}})
    nets = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = ViT(SMALL)
        plain = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizer = build_optimizer(net, config) if ours else plain
        for seed in range(3):
            optimizer.zero_grad()
            batch_loss(net, seed).backward()
            optimizer.step()
        nets.append(net)
    torch.testing.assert_close(dict(nets[0].named_parameters()), dict(nets[1].named_parameters()))


def test_an_optimizer_of_timm_by_name():
    pytest.importorskip("timm")
    optimizer = build_optimizer(ViT(SMALL), OptimConfig(name="Lion", lr=1e-4))
    assert (type(optimizer).__module__, optimizer.param_groups[0]["lr"]) == ("timm.optim.lion", 1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Sgd", {}, "optim.name=Sgd is not known; choose one of adamw, muon, a class of torch.optim or timm.optim"),
        ("Optimizer", {}, "optim.options.Optimizer: "),
        ("SGD", {"momentm": 1}, "optim.options.SGD: SGD.__init__() got an unexpected keyword argument 'momentm'"),
        ("SGD", {"momentum": -1}, "optim.options.SGD: Invalid momentum value: -1"),
    ],
)
def test_an_optimizer_that_cannot_be_built_names_the_key(name, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build_optimizer(ViT(SMALL), OptimConfig(name=name, options={name: options}))


@pytest.mark.parametrize("name", ["adamw", "muon", "SGD"])
def test_learning_rates_fall_from_each_block_to_the_one_below(name):
    """With two blocks, the stem is three steps below the head."""
    net = ViT(replace(CONV, registers=1))
    config = OptimConfig(name=name, lr=1.0, muon_lr=1.0, layer_decay=0.5)
    names = {id(p): name for name, p in net.named_parameters()}
    rate = {names[id(p)]: g["lr"] for g in build_optimizer(net, config).param_groups for p in g["params"]}
    assert rate.keys() == dict(net.named_parameters()).keys()
    depth = {"patch_embed": 3, "cls_token": 3, "pos_embed": 3, "registers": 3, "blocks.0": 2, "blocks.1": 1}
    for parameter, value in rate.items():
        part = next((part for part in depth if parameter.startswith(part)), None)
        assert value == 0.5 ** depth.get(part, 0), parameter


def test_frozen_parts_keep_their_weights_and_statistics():
    net = ViT(CONV)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    frozen = freeze(net, ["patch_embed", "blocks.0", "pos_embed"])
    optimizer = build_optimizer(net, OptimConfig(name="muon", muon_lr=0.1))
    net.train()
    for module in frozen:
        module.eval()
    batch_loss(net, 0).backward()
    optimizer.step()
    for name, value in net.state_dict().items():
        kept = name.startswith(("patch_embed.", "blocks.0.")) or name == "pos_embed"
        assert torch.equal(value, before[name]) == kept, name


@pytest.mark.parametrize("config", [SMALL, CONV])
def test_a_frozen_backbone_leaves_the_head(config):
    net = ViT(config)
    frozen = freeze(net, ["backbone"])
    assert all(parameter.requires_grad == name.startswith("head.") for name, parameter in net.named_parameters())
    assert not any(module.training for part in frozen for module in part.modules())
    assert {id(part) for part in frozen} == {id(part) for name, part in net.named_children() if name != "head"}
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze(net, ["backbone", "head"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["patch"], "optim.freeze=patch is not a part of the network; it has patch_embed, "),
        (["cls_token", "pos_embed", "patch_embed", "blocks", "norm", "head"], "leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(names, message):
    with pytest.raises(InputError, match=message):
        freeze(ViT(SMALL), names)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_that_of_each_class(smoothing):
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    shares = F.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    each = [F.binary_cross_entropy(logits[:, c].sigmoid(), shares[:, c]) for c in range(5)]
    torch.testing.assert_close(register.loss["bce"](logits, labels, smoothing), torch.stack(each).sum())
    torch.testing.assert_close(
        register.loss["bce"](logits, F.one_hot(labels, 5).float(), smoothing), torch.stack(each).sum()
    )


@pytest.mark.usefixtures("registries")
def test_a_schedule_of_ones_own_is_warmed_up_and_ends_at_min_lr():
    @register.schedule("power", exponent=key(1.0, "Exponent.", above=0))
    def power(done: float, exponent: float) -> float:
        return (1 - done) ** exponent

    options = {"power": {"exponent": 2.0}}
    values = rates(OptimConfig(lr=1.0, schedule="power", warmup=0.5, min_lr=0.5, options=options), 8)
    expected = torch.optim.lr_scheduler.PolynomialLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), total_iters=4, power=2.0
    )
    tail = [0.5 + expected.get_last_lr()[0]]
    for _ in range(3):
        expected.optimizer.step()
        expected.step()
        tail.append(0.5 + expected.get_last_lr()[0])
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, *tail])


def test_gradients_can_be_clipped_in_mixed_precision():
    net = ViT(SMALL)
    optimizer = build_optimizer(net, OptimConfig())
    batch_loss(net, 0).backward()
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 0.01)  # 16-mixed needs a GPU; both ask the optimizer
    assert torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item() == pytest.approx(0.01, rel=1e-3)


def batch_loss(net: ViT, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 1, net.image_size, net.image_size, generator=generator)
    return nn.functional.cross_entropy(net(images), torch.arange(4))


@pytest.mark.parametrize("model", [SMALL, CONV])
def test_muon_trains_the_matrices_of_blocks_and_stem_and_adamw_the_rest(model, monkeypatch):
    """Against separate optimizers of torch; its Muon steps on matrices that share memory with the convolutions."""
    monkeypatch.setattr("vit_lightning.recipe.optim.has_fast_bfloat16", lambda device: True)
    config = OptimConfig(name="muon", lr=0.01, muon_lr=0.05, ns_steps=3, weight_decay=0.1)
    nets = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = ViT(model).eval()
        stem = {p for p in net.patch_embed.parameters() if p.shape[2:] == (3, 3)}
        linear = {m.weight for m in net.modules() if isinstance(m, nn.Linear)}
        matrices = stem | {p for p in net.blocks.parameters() if p in linear}
        assert len(matrices) == len(stem) + 2 * 4
        decay = [p for p in net.parameters() if p in linear - matrices]
        rest = [p for p in net.parameters() if p not in linear | matrices]
        flat = {p: nn.Parameter(p.detach().flatten(1)) for p in matrices}
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        torchs = [
            torch.optim.AdamW(groups, lr=0.01, fused=True),
            torch.optim.Muon(flat.values(), lr=0.05, weight_decay=0.1, ns_steps=3),
        ]
        optimizers = [build_optimizer(net, config)] if ours else torchs
        for step in range(5):
            net.zero_grad()
            batch_loss(net, step).backward()
            for parameter, matrix in flat.items():
                matrix.grad = parameter.grad.flatten(1)
            for optimizer in optimizers:
                optimizer.step()
        nets.append(net)
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (5, 2, 3, 3)])
def test_muon_in_float32_steps_as_in_float64(shape):
    """Against the singular values of the gradient, which the iteration changes by a polynomial."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    errors = {}
    u, s, vt = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s @ vt * max(1, u.shape[0] / vt.shape[1]) ** 0.5).float().view(shape)
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, dtype=dtype).step()
        errors[dtype] = (-weight.detach() - expected).abs().max()
    assert errors[torch.float32] < 1e-5
    assert errors[torch.bfloat16] > 1e-3


def test_combined_optimizers_resume_exactly_and_follow_a_schedule():
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_states_of_earlier_versions_are_loaded(name):
    """They were saved with convolutions as matrices (out, in * 9)."""
    config = OptimConfig(name=name)
    torch.manual_seed(0)
    net = ViT(CONV).eval()
    resumed = deepcopy(net)
    optimizer, other = build_optimizer(net, config), build_optimizer(resumed, config)
    batch_loss(net, 0).backward()
    optimizer.step()
    resumed.load_state_dict(net.state_dict())
    state = deepcopy(optimizer.state_dict())
    for part in state.get("parts", [state]):
        for values in part["state"].values():
            for name, value in values.items():
                values[name] = value.flatten(1) if value.shape[2:] == (3, 3) else value
    other.load_state_dict(state)
    for one, stepping in ((net, optimizer), (resumed, other)):
        one.zero_grad()
        batch_loss(one, 1).backward()
        stepping.step()
    for one, two in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_average_of_weights_equals_torch_after_the_warmup_of_its_decay():
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
        if step == 1:  # 2 / 11 of the first value remain
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


def test_constant_schedule():
    assert rates(OptimConfig(lr=0.5), 7) == [0.5] * 7


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize(
    ("schedule", "torchs"),
    [
        ("cosine", lambda optimizer, end: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.5 * end)),
        ("linear", lambda optimizer, end: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=20)),
    ],
)
def test_schedules_equal_torch(schedule, torchs, end):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torchs(optimizer, end)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(OptimConfig(lr=0.5, schedule=schedule, min_lr=end), 20) == pytest.approx(expected)


def test_a_schedule_by_time_follows_the_same_curve():
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
    assert values == pytest.approx([by_step[i] for i in (0, 0, 2, 4, 10, 11, 19)])  # never above the peak
    assert optimizer.param_groups[0]["lr"] == 0


def test_warmup_rises_linearly_to_the_peak():
    values = rates(OptimConfig(lr=1.0, schedule="cosine", warmup=0.2), 20)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[4] == 1.0
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] < 0.02
