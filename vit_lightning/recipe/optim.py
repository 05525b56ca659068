"""Parameter groups, optimizers, the learning-rate schedule, and the moving average of the weights."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vit_lightning.config import OptimConfig
from vit_lightning.devices import has_fast_bfloat16
from vit_lightning.model.vit import ViT


def build_optimizer(net: ViT, config: OptimConfig) -> Optimizer:
    """Build AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101), or Muon and AdamW.

    Unless ``config.decay_all``, only the weights of linear layers and of the stem's 3 × 3 convolutions decay. With
    ``config.name=muon``, Muon trains :meth:`~vit_lightning.model.vit.ViT.muon_matrices`.
    """
    matrices = set(net.muon_matrices())
    decayed = matrices | {module.weight for module in net.modules() if isinstance(module, nn.Linear)}
    muon = [p for p in net.parameters() if p in matrices] if config.name == "muon" else []
    rest = [p for p in net.parameters() if not muon or p not in matrices]
    decay = [p for p in rest if config.decay_all or p in decayed]
    no_decay = [p for p in rest if not (config.decay_all or p in decayed)]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    adamw = AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)
    adamw.register_load_state_dict_post_hook(match_shapes)
    # Fused, AdamW would unscale the gradients of 16-mixed precision itself, and Lightning then refuses to clip them.
    adamw._step_supports_amp_scaling = False
    if not muon:
        return adamw
    dtype = torch.bfloat16 if has_fast_bfloat16(muon[0].device) else torch.float32
    return CombinedOptimizer(adamw, Muon(muon, config.muon_lr, config.weight_decay, config.ns_steps, dtype=dtype))


def match_shapes(optimizer: Optimizer) -> None:
    """Reshape a loaded state that was saved when 3 × 3 convolutions had 2-D weights (out, in · 9)."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if parameter.ndim == 4 and value.ndim == 2:
                state[name] = value.view_as(parameter)


class Muon(Optimizer):
    """Muon: momentum with orthogonalised updates (Jordan, 2024, https://kellerjordan.github.io/posts/muon/).

    Equals :class:`torch.optim.Muon`, but also takes convolutions, as matrices (out, in · h · w), and any ``dtype``.

    Args:
        params: parameters of at least two dimensions.
        lr: learning rate; multiplied by ``sqrt(max(1, rows / columns))`` for each matrix.
        weight_decay: decoupled weight decay.
        ns_steps: Newton-Schulz iterations.
        momentum: coefficient of the Nesterov momentum.
        dtype: precision of the iterations; CPUs without bfloat16 instructions are up to 100 times slower in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        ns_steps: int = 5,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype  # not in a group, so that a checkpoint of another device does not change it
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, ns_steps=ns_steps, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; ``closure`` computes and returns the loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad, state = parameter.grad.flatten(1), self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                average = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = orthogonalise(grad.lerp(average, momentum).to(self.dtype), group["ns_steps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                rows, columns = update.shape
                parameter.add_(update.view_as(parameter), alpha=-lr * math.sqrt(max(1, rows / columns)))
        return loss


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Move the singular values of a matrix (m, n) towards one, by Jordan's quintic Newton-Schulz iteration."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)  # singular values in [0, 1]
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class CombinedOptimizer(Optimizer):
    """Several optimizers that step together and look like one to Lightning and to schedules.

    Args:
        parts: optimizers of disjoint parameters; their groups are shared, so that a schedule changes them.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with every part; ``closure`` computes and returns the loss, once."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_schedule(
    optimizer: Optimizer, config: OptimConfig, steps: int, elapsed: Callable[[], float] | None = None
) -> LambdaLR:
    """Build the schedule: a linear warm-up, then constant, or a cosine or a line down to the run's end.

    Args:
        optimizer: the optimizer whose learning rates are scaled.
        config: the shape of the schedule.
        steps: total optimizer steps of the run.
        elapsed: returns the completed fraction of the run, for a schedule by time; ``None`` for one by steps.
    """
    warmup = round(config.warmup * steps)

    def factor(step: float) -> float:
        if elapsed is not None:
            step = elapsed() * steps
        if step < warmup:
            return min(1.0, (step + 1) / warmup)  # by time, step is not an integer
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        height = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return config.min_lr + (1 - config.min_lr) * height

    return LambdaLR(optimizer, factor)


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all tensors taken together; they may be sharded over processes."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def ema_update(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """Return an exponential moving average for ``multi_avg_fn`` of :class:`torch.optim.swa_utils.AveragedModel`.

    After n steps the decay is at most ``(1 + n) / (10 + n)``, so that the initial weights are soon forgotten.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], step: Tensor | int) -> None:
        n = int(step)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, weight)
        else:  # integers, such as a batch norm's number of batches
            torch._foreach_copy_(averages, values)

    return update
