"""Parameter groups, optimizers, their learning-rate schedule, and the average of the weights."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

from vit_lightning.config import OptimConfig
from vit_lightning.devices import has_fast_bfloat16
from vit_lightning.model.vit import Conv


def build_optimizer(net: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) in PyTorch's fused form, or Muon with it.

    Unless ``config.decay_all``, only the matrices of linear layers and convolutions decay: norms, biases, tokens and
    position embedding do not. With ``config.name=muon`` the matrices of the blocks and of a convolutional stem belong
    to Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon/). Unlike there, the first convolution is among
    them, and queries, keys and values are one matrix.
    """
    matrices = {id(m.weight) for m in net.modules() if isinstance(m, nn.Linear)}
    muon = {
        id(m.weight)
        for name, m in net.named_modules()
        if config.name == "muon" and (isinstance(m, Conv) or (isinstance(m, nn.Linear) and name.startswith("blocks.")))
    }
    decay = [p for p in net.parameters() if (config.decay_all or id(p) in matrices) and id(p) not in muon]
    rest = [p for p in net.parameters() if not (config.decay_all or id(p) in matrices)]
    groups = [
        {"params": params, "weight_decay": weight_decay}
        for params, weight_decay in ((decay, config.weight_decay), (rest, 0.0))
        if params
    ]
    adamw = AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)
    # Fused, it would take on the unscaling of gradients in 16-mixed precision, and Lightning then refuses to clip them.
    adamw._step_supports_amp_scaling = False
    if not muon:
        return adamw
    inner = [p for p in net.parameters() if id(p) in muon]
    device = inner[0].device
    kind = Muon if has_fast_bfloat16(device) else FullPrecisionMuon
    return Joined(adamw, kind(inner, lr=config.muon_lr, weight_decay=config.weight_decay, ns_steps=config.ns_steps))


class FullPrecisionMuon(Muon):
    """Muon in float32, for devices that are slow in the bfloat16 it casts to: on old processors a hundred times so."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch's, which has no setting for it; ``closure`` computes loss and gradients once."""
        with KeepFloat32():
            return super().step(closure)


class KeepFloat32(TorchFunctionMode):
    """Where active, ``tensor.bfloat16()`` is a copy of the tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer that one call; leave others as they are."""
        if func is Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


class Joined(Optimizer):
    """Several optimizers that step together and look like one, as Lightning and schedulers want it.

    Args:
        parts: optimizers of disjoint parameters; their groups are shared, so that a schedule reaches them.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each take its step; ``closure`` computes loss and gradients once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_schedule(
    optimizer: Optimizer, config: OptimConfig, steps: int, elapsed: Callable[[], float] | None = None
) -> LambdaLR:
    """The learning rate by step: a linear warm-up, then constant, or a cosine or line down to zero at the run's end.

    Args:
        optimizer: its learning rates are scaled.
        config: the schedule's shape.
        steps: optimizer steps of the whole run.
        elapsed: gives the share of the run that is over, where time is to count and not steps.
    """
    warmup = round(config.warmup * steps)

    def factor(step: float) -> float:
        if elapsed is not None:
            step = elapsed() * steps
        if step < warmup:
            return min(1.0, (step + 1) / warmup)  # by time, a step is a fraction
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def total_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together; each process may hold a part of them."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def ema_update(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """An exponential moving average for :class:`torch.optim.swa_utils.AveragedModel`'s ``multi_avg_fn``.

    Its decay warms up as ``(1 + n) / (10 + n)`` after n steps, so that the first, poor weights are soon forgotten.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], step: Tensor | int) -> None:
        n = int(step)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, weight)
        else:  # counts, as of batches in a batch norm
            torch._foreach_copy_(averages, values)

    return update
