"""What a contestant of the benchmark measures."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from vit_lightning.benchmarks.contestants import shares


def event(key: str, cpu: float, device: float, device_type: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(key=key, self_cpu_time_total=cpu, self_device_time_total=device, device_type=device_type)


def test_a_kernels_time_counts_once():
    """The profiler gives it twice: to the operator that started the kernel, and to the kernel itself."""
    events = [
        event("aten::mm", 3.0, 60.0),
        event("aten::add", 6.0, 39.5),
        event("aten::view", 1.0, 0.5),
        event("gemm kernel", 0.0, 60.0, DeviceType.CUDA),
        event("add kernel", 0.0, 40.0, DeviceType.CUDA),
    ]
    assert shares(events, "device") == pytest.approx({"aten::mm": 0.6, "aten::add": 0.395, "rest": 0.005})
    assert shares(events, "cpu") == pytest.approx({"aten::add": 0.6, "aten::mm": 0.3, "aten::view": 0.1, "rest": 0.0})
