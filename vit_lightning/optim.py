"""Parameter groups, the optimizer and its learning-rate schedule."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vit_lightning.config import OptimConfig


def build_optimizer(net: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) in PyTorch's fused form.

    Unless ``config.decay_all``, only the matrices of linear layers decay: norms, biases, the class token and the
    position embedding do not.
    """
    matrices = {id(m.weight) for m in net.modules() if isinstance(m, nn.Linear)}
    decay = [p for p in net.parameters() if config.decay_all or id(p) in matrices]
    rest = [p for p in net.parameters() if not (config.decay_all or id(p) in matrices)]
    groups = [
        {"params": params, "weight_decay": weight_decay}
        for params, weight_decay in ((decay, config.weight_decay), (rest, 0.0))
        if params
    ]
    return AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)


def build_schedule(optimizer: Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """The learning rate by step: a linear warm-up, then constant, or a cosine down to zero after the last step.

    Args:
        optimizer: its learning rates are scaled.
        config: the schedule's shape.
        steps: optimizer steps of the whole run.
    """
    warmup = round(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return LambdaLR(optimizer, factor)
