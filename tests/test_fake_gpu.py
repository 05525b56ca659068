"""The code paths of a GPU without one: on fake CUDA tensors, which refuse to meet a tensor of another device."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, unset_fake_temporarily

from vit_lightning import register
from vit_lightning.analysis.attention import attention_maps, attention_rollout, on_patches, position_similarity
from vit_lightning.config import AugmentConfig, ModelConfig, OptimConfig
from vit_lightning.model.vit import ViT
from vit_lightning.recipe import augment
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.metrics import build_metrics
from vit_lightning.recipe.optim import build_optimizer

GPU = torch.device("cuda", 0)
MODELS = [
    {},
    {"block": "blog"},
    {"pool": "mean", "registers": 2, "layer_scale": 1e-4, "drop_path": 0.1},
    {"pool": "attention", "position": "rotary", "zero_init": True},
    {"patch_embed": "conv", "patch_size": 4, "stem_depth": 1, "stem_se": True, "pool": "mean"},
]
AUGMENTS = [
    {},
    {"crop": 2, "rotation": 0.0, "flip": 0.5},
    {"shift": 0.1, "erase": 0.5},
    {"mixup": 0.8},
    {"cutmix": 1.0, "mix_prob": 0.5},
    {"mixup": 0.8, "cutmix": 1.0, "until": 0.5},
]


MODE = FakeTensorMode()  # tensors without data, of any device


@pytest.fixture(autouse=True)
def fake():
    with MODE:
        yield


def on_gpu(module: nn.Module) -> nn.Module:
    """A module of real tensors with fake ones on a GPU instead."""
    with MODE:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, value in table.items():
                    if value is not None:
                        moved = MODE.from_tensor(value).to(GPU)
                        table[name] = nn.Parameter(moved) if table is part._parameters else moved
    return module


def model(**changes) -> ModelConfig:
    sizes = dict(image_size=16, channels=3, num_classes=7, embed_dim=16, heads=2, layers=3, mlp_head_units=[9])
    return ModelConfig(**{"patch_size": 8, **sizes, **changes})


def network(**changes) -> ViT:
    with unset_fake_temporarily():
        return ViT(model(**changes))


def classifier(transforms: dict | None = None, **optim) -> ViTClassifier:
    with unset_fake_temporarily():
        module = ViTClassifier(
            asdict(model()), asdict(OptimConfig(**optim)), [str(i) for i in range(7)], [0.5] * 3, [0.25] * 3,
            augment=None if transforms is None else asdict(AugmentConfig(**transforms)),
        )  # fmt: skip
    on_gpu(module.net)
    module.mean, module.std = (MODE.from_tensor(value).to(GPU) for value in (module.mean, module.std))
    module._device = GPU  # where Lightning would have moved it
    return module


def batch(count: int = 5, side: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(count, 3, side, side + 4, dtype=torch.uint8, device=GPU)
    return images, torch.zeros(count, dtype=torch.int64, device=GPU)


class Progress:
    """What a module asks its Trainer during a step."""

    global_step, estimated_stepping_batches, accumulate_grad_batches, global_rank = 3, 10, 1, 0


def test_a_tensor_on_the_wrong_device_is_noticed():
    with pytest.raises(FakeTensorDeviceMismatchError):
        augment.denormalise(torch.zeros(1, 3, 8, 8, device=GPU), torch.zeros(3), torch.ones(3, device=GPU))


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_the_network_of_every_kind(changes, training):
    net = on_gpu(network(**changes)).train(training)
    for side in (16, 24):  # the second resizes the positions
        logits = net(torch.zeros(5, 3, side, side, device=GPU))
        assert (logits.shape, logits.device) == ((5, 7), GPU)


@pytest.mark.parametrize("changes", MODELS)
def test_attention(changes):
    net = on_gpu(network(**changes)).eval()
    maps = attention_maps(net, torch.zeros(2, 3, 16, 16, device=GPU))
    assert on_patches(net, attention_rollout(maps)).device == GPU
    if net.pos_embed is not None:
        assert position_similarity(net).device == GPU


@pytest.mark.parametrize("transforms", AUGMENTS)
@pytest.mark.parametrize("small", [None, 8])
def test_a_training_step_up_to_its_loss(transforms, small, monkeypatch):
    module = classifier(transforms, small_size=small, small_share=0.9, label_smoothing=0.1)
    monkeypatch.setattr(augment, "_beta", lambda a, batch: torch.rand(batch))  # torch's reads values from its sample
    monkeypatch.setattr(ViTClassifier, "trainer", Progress())
    monkeypatch.setattr(ViTClassifier, "global_step", 3)
    monkeypatch.setattr(ViTClassifier, "global_rank", 0)
    x, targets = module.augmented(*batch())
    assert (x.device, targets.device) == (GPU, GPU)
    assert x.shape[-1] == (small or 16)
    for loss in ("cross_entropy", "bce"):
        assert augment_loss(loss, module.net(x), targets).device == GPU


def augment_loss(name: str, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return register.loss[name](logits, targets, 0.1)


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation(tta):
    module = classifier().eval()
    images, _ = batch()
    assert module(images).device == GPU
    assert module.classify(images, tta).device == GPU
    assert module(images.cpu()).device == GPU  # images come from anywhere


def test_metrics():
    """Of those that only sum; a count by class depends on values, which fake tensors lack."""
    images, labels = batch()
    logits = torch.zeros(len(images), 12, device=GPU)
    values = dict(preds=logits, target=labels, value=F.cross_entropy(logits, labels), weight=len(labels))
    with unset_fake_temporarily():
        metrics = build_metrics(12, [])
    for name in ("acc", "acc5"):
        metric = metrics[name]
        metric._device = GPU
        for key, state in metric.metric_state.items():
            setattr(metric, key, MODE.from_tensor(state).to(GPU))
        metric.update(**metric._filter_kwargs(**values))
        assert all(state.device == GPU for state in metric.metric_state.values())


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("name", ["SGD", "muon"])
def test_a_backward_pass_and_an_optimizer_step(changes, name):
    """On the meta device, since fake tensors have no gradients on a device that is not there."""
    with unset_fake_temporarily():
        net = ViT(model(**changes)).to("meta")
        parts = build_optimizer(net, OptimConfig(name=name))
        F.cross_entropy(
            net(torch.zeros(5, 3, 16, 16, device="meta")), torch.zeros(5, dtype=torch.int64, device="meta")
        ).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        for optimizer in getattr(parts, "parts", [parts]):
            if not isinstance(optimizer, torch.optim.AdamW):  # whose fused kernel takes no meta tensors
                optimizer.step()
