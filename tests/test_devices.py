"""The machine and how it is used."""

import pytest
import torch
from conftest import needs_compiler

from vit_lightning.config import ModelConfig, TrainerConfig
from vit_lightning.devices import check_accelerator, compile_network, resolve_precision
from vit_lightning.keys import InputError
from vit_lightning.model.vit import ViT


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_an_unavailable_accelerator_is_refused():
    with pytest.raises(InputError, match=r"trainer\.accelerator=gpu is not available; use trainer"):
        check_accelerator(TrainerConfig(accelerator="gpu"))


def test_an_unsupported_precision_is_refused():
    with pytest.raises(InputError, match=r"needs a GPU; on the CPU use trainer\.precision=bf16-mixed"):
        check_accelerator(TrainerConfig(accelerator="cpu", precision="16-mixed"))
    check_accelerator(TrainerConfig(accelerator="cpu", precision="bf16-mixed"))


@pytest.mark.parametrize(
    ("instruction", "precision"), [("avx512_bf16", "bf16-mixed"), ("amx_bf16", "bf16-mixed"), ("avx2", "32-true")]
)
def test_auto_is_mixed_precision_if_the_processor_has_instructions_for_it(instruction, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    assert resolve_precision(TrainerConfig(accelerator="cpu", precision="auto")).precision == precision
    assert resolve_precision(TrainerConfig(accelerator="cpu", precision="bf16-mixed")).precision == "bf16-mixed"


@pytest.mark.slow
@needs_compiler
def test_a_compiled_network_is_compiled_and_gives_the_same_logits(capsys):
    config = ModelConfig(
        image_size=6, patch_size=3, channels=1, num_classes=7, embed_dim=8, heads=2, layers=2, mlp_head_units=[11]
    )
    net = ViT(config).eval()
    images = torch.randn(5, 1, 6, 6)
    with torch.inference_mode():
        eager = net(images)
        compile_network(net, torch.device("cpu"))
        compiled = net(images)
    assert capsys.readouterr().err == ""
    assert net._compiled_call_impl is not None
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
