"""What the benchmark compares with is what it says it is."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from vit_lightning.benchmarks.baselines import TutorialImages, TutorialViT, installed, library
from vit_lightning.config import ModelConfig
from vit_lightning.model.vit import ViT

CONFIG = ModelConfig(
    image_size=15, patch_size=5, channels=3, num_classes=7, embed_dim=22, heads=2, layers=3, mlp_dim=44
)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_tutorials_network_is_this_projects():
    torch.manual_seed(0)
    ours = ViT(CONFIG).eval()
    theirs = TutorialViT(CONFIG).eval()
    names = {
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj",
    }
    state = {}
    for key, value in ours.state_dict().items():
        for name, other in names.items():
            key = key.replace(name, other)
        state[key] = value + 0.1 * torch.randn_like(value)
    theirs.load_state_dict(state)
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    images = torch.randn(4, 3, 15, 15)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_tutorials_images_go_through_pil_one_at_a_time():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(6)
    images = TutorialImages(pixels, labels, 15, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    images.transform.transforms[1].degrees = (0.0, 0.0)
    images.transform.transforms[2].p = 0.0
    picture = Image.fromarray(pixels[2].permute(1, 2, 0).numpy()).resize((15, 15), Image.Resampling.BILINEAR)
    expected = transforms.functional.normalize(
        transforms.functional.to_tensor(picture), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    )
    image, label = images[2]
    torch.testing.assert_close(image, expected)
    assert label == 2


@pytest.mark.parametrize("name", ["torchvision", "timm", "vit-pytorch", "Hugging Face"])
def test_the_libraries_networks_are_of_the_same_shape(name):
    if name not in installed(channels=3):
        pytest.skip(f"{name} is not installed")
    config = replace(CONFIG, image_size=20)
    net = library(name, config)
    out = net(torch.randn(2, 3, 20, 20))
    assert getattr(out, "logits", out).shape == (2, 7)
    # vit-pytorch norms its patches and has no bias in its attention.
    assert parameters(net) == pytest.approx(parameters(ViT(config)), rel=0.001)
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} >= {0.1, 0.5}


def test_torchvisions_network_sees_colour_alone():
    assert "torchvision" in installed(channels=3)
    assert "torchvision" not in installed(channels=1)
