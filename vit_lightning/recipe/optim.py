"""Losses, parameter groups, optimizers, learning-rate schedules, and the moving average of the weights.

A registered optimizer is constructed with the network and the configuration. A schedule maps the completed fraction of
a run to a factor. A loss takes logits, targets and the label smoothing, and optionally class weights as ``weight``.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vit_lightning import register
from vit_lightning.config import OptimConfig
from vit_lightning.devices import has_fast_bfloat16
from vit_lightning.keys import InputError
from vit_lightning.model.vit import ViT


def build_optimizer(net: ViT, config: OptimConfig) -> Optimizer:
    """Build the optimizer of the trained parameters.

    Raises:
        InputError: if ``config.name`` is unknown, or its class does not take the arguments.
    """
    if config.name in list(register.optimizer):
        return register.optimizer.build(config.name, config.options, net, config)
    cls = getattr(torch.optim, config.name, None) or getattr(timm_optimizers(), config.name, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise InputError(f"optim.name={config.name} is not known; choose one of {register.optimizer.choices}")
    decay = {"weight_decay": config.weight_decay} if "weight_decay" in inspect.signature(cls).parameters else {}
    try:
        return cls(parameter_groups(net, config), **{"lr": config.lr, **decay, **config.options.get(config.name, {})})
    except (TypeError, ValueError) as error:
        raise InputError(f"optim.options.{config.name}: {error}") from error


def timm_optimizers() -> ModuleType | None:
    """``timm.optim``, if timm is installed."""
    try:
        import timm.optim
    except ImportError:
        return None
    return timm.optim


def parameter_groups(net: ViT, config: OptimConfig, parameters: Iterable[Tensor] | None = None) -> list[dict[str, Any]]:
    """Group parameters for an optimizer, by learning rate and weight decay.

    Unless ``config.decay_all``, only the weights of linear layers and of the stem's 3 × 3 convolutions decay. With
    ``config.layer_decay``, the learning rate falls from each block to the one below it (Clark et al., 2020,
    https://arxiv.org/abs/2003.10555, section 3.1, "layer-wise learning rate decay").

    Args:
        net: the network.
        config: ``lr``, ``weight_decay``, ``decay_all`` and ``layer_decay``.
        parameters: parameters to group; ``None`` for all that are trained.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``, the highest learning rate first.
    """
    chosen = None if parameters is None else set(parameters)
    decayed = {*net.muon_matrices(), *(module.weight for module in net.modules() if isinstance(module, nn.Linear))}
    top = len(net.blocks) + 1
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and (chosen is None or parameter in chosen):
            first, *rest = name.split(".")
            below = first in ("patch_embed", "pos_embed", "cls_token", "registers")
            level = int(rest[0]) + 1 if first == "blocks" else 0 if below else top
            key = top - level if config.layer_decay < 1 else 0, not (config.decay_all or parameter in decayed)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[depth, plain],
            "lr": config.lr * config.layer_decay**depth,
            "weight_decay": 0.0 if plain else config.weight_decay,
        }
        for depth, plain in sorted(groups)
    ]


@register.optimizer("adamw")
def adamw(net: ViT, config: OptimConfig, parameters: Iterable[Tensor] | None = None) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101)."""
    groups = parameter_groups(net, config, parameters)
    optimizer = AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)
    optimizer.register_load_state_dict_post_hook(match_shapes)
    # Fused AdamW would unscale the gradients of 16-mixed precision itself, and Lightning would refuse to clip them.
    optimizer._step_supports_amp_scaling = False
    return optimizer


@register.optimizer("muon")
def muon(net: ViT, config: OptimConfig) -> Optimizer:
    """Muon for :meth:`~vit_lightning.model.vit.ViT.muon_matrices`, and AdamW for the rest."""
    matrices = {matrix for matrix in net.muon_matrices() if matrix.requires_grad}
    if not matrices:
        return adamw(net, config)
    dtype = torch.bfloat16 if has_fast_bfloat16(next(net.parameters()).device) else torch.float32
    groups = parameter_groups(net, replace(config, lr=config.muon_lr), matrices)
    rest = [parameter for parameter in net.parameters() if parameter not in matrices]
    return CombinedOptimizer(
        adamw(net, config, rest), Muon(groups, config.muon_lr, config.weight_decay, config.ns_steps, dtype=dtype)
    )


def freeze(net: nn.Module, names: list[str]) -> list[nn.Module]:
    """Exclude parts of a network from training.

    Args:
        net: the network.
        names: names of modules or parameters, such as ``patch_embed``, ``blocks.0`` or ``pos_embed``; ``backbone``
            means everything except the head.

    Returns:
        The frozen modules, in evaluation mode, so that their batch norms do not change.

    Raises:
        InputError: if a name is unknown, or nothing is left to train.
    """
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    if "backbone" in names:
        below = {name.partition(".")[0] for name in [*modules, *parameters]} - {"", "head"}
        names = sorted({*names, *below} - {"backbone"})
    for name in names:
        if name not in modules and name not in parameters:
            known = ", ".join([*(key for key, _ in net.named_children()), "blocks.0", "pos_embed", "cls_token"])
            raise InputError(f"optim.freeze={name} is not a part of the network; it has {known}")
        for key, parameter in parameters.items():
            if key == name or key.startswith(f"{name}."):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(f"optim.freeze={','.join(names)} leaves nothing to train; remove some")
    frozen = [modules[name] for name in names if name in modules]
    for module in frozen:
        module.eval()  # Lightning does not call train() before the first epoch
    return frozen


def match_shapes(optimizer: Optimizer) -> None:
    """Reshape a loaded state that dates from when 3 × 3 convolutions had 2-D weights (out, in · 9)."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if parameter.ndim == 4 and value.ndim == 2:
                state[name] = value.view_as(parameter)


class Muon(Optimizer):
    """Muon: momentum with orthogonalised updates (Jordan, 2024, https://kellerjordan.github.io/posts/muon/).

    Like :class:`torch.optim.Muon`, but also takes convolutions, as matrices (out, in · h · w), and any ``dtype``.

    Args:
        params: parameters of at least two dimensions, or groups of them.
        lr: learning rate; multiplied by ``sqrt(max(1, rows / columns))`` for each matrix.
        weight_decay: decoupled weight decay.
        ns_steps: Newton-Schulz iterations.
        momentum: coefficient of the Nesterov momentum.
        dtype: precision of the iterations; CPUs without bfloat16 instructions are up to 100 times slower in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        ns_steps: int = 5,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype  # not in a group, so that a checkpoint from another device does not change it
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
    """Move the singular values of a matrix (m, n) towards one with Jordan's quintic Newton-Schulz iteration."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)  # singular values in [0, 1]
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class CombinedOptimizer(Optimizer):
    """Several optimizers that step together and look like one to Lightning and to schedules.

    Args:
        parts: optimizers of disjoint parameters; their groups are shared, so schedules apply to them.
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
        """Return the states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_schedule(
    optimizer: Optimizer, config: OptimConfig, steps: int, elapsed: Callable[[], float] | None = None
) -> LambdaLR:
    """Build the schedule: a linear warm-up, then the registered shape from 1 to 0, scaled to end at ``min_lr``.

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
            return min(1.0, (step + 1) / warmup)  # with a schedule by time, step is not an integer
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        height = register.schedule.build(config.schedule, config.options, done)
        return config.min_lr + (1 - config.min_lr) * height

    return LambdaLR(optimizer, factor)


@register.schedule("constant")
def constant(done: float) -> float:
    """The full learning rate."""
    return 1.0


@register.schedule("linear")
def linear(done: float) -> float:
    """A line down to zero; ``done`` is the completed fraction after the warm-up, in [0, 1]."""
    return 1 - done


@register.schedule("cosine")
def cosine(done: float) -> float:
    """Half a cosine down to zero (Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983, equation 5)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def class_weights(counts: Tensor, kind: str) -> list[float] | None:
    """The weights of the classes in the training loss, whose mean over the training images is one.

    Args:
        counts: (classes,), number of training images per class; a class without any has weight zero.
        kind: ``balanced`` for weights inversely proportional to ``counts``, ``sqrt`` for their square roots, ``none``.
    """
    if kind == "none":
        return None
    weights = counts.double().pow(-1.0 if kind == "balanced" else -0.5)
    weights[counts == 0] = 0.0
    return (weights * counts.sum() / (weights * counts).sum()).tolist()


@register.loss("cross_entropy")
def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (B, classes) and labels (B,) or class probabilities (B, classes).

    With weights (classes,), the sum over the batch is divided by B, as in Keras, and not by the sum of the weights, as
    torch does for labels only. Mixed images, several processes and accumulated gradients therefore change nothing.
    """
    if weight is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, targets, weight, reduction="none", label_smoothing=label_smoothing).mean()


@register.loss("bce")
def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float, weight: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of each class against the rest, as in DeiT III (Touvron et al., 2022, arXiv:2204.07118).

    Summed over classes and averaged over the batch; arguments as for :func:`cross_entropy`. An image's entire sum has
    the weight of its label.
    """
    classes = logits.shape[1]
    shares = targets if targets.ndim == 2 else F.one_hot(targets, classes).to(logits.dtype)
    smooth = shares * (1 - label_smoothing) + label_smoothing / classes
    losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(dim=1)
    return (losses if weight is None else losses * (shares @ weight)).mean()


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Return the joint Euclidean norm of all tensors, which may be sharded across processes."""
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
        else:  # integers, such as a batch norm's count of batches
            torch._foreach_copy_(averages, values)

    return update
