"""What a contestant of the benchmark measures, and the process in which it does."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import composed
from torch.autograd import DeviceType

from vit_lightning.benchmarks.contestants import Contestant, process_of, shares
from vit_lightning.keys import InputError


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


def images_and_process(config, data, device) -> tuple[int, int]:
    return len(data.arrays.images["train"]), os.getpid()


def fail(config, data, device) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.slow
def test_a_contestant_measures_in_a_process_of_its_own_until_one_fails(tmp_path, capfd):
    config = composed("data=digits", f"data.cache_dir={tmp_path}", name="benchmark")
    with process_of(Contestant("slow library", {}), config, torch.device("cpu")) as measure:
        first, second = (measure(images_and_process, config) for _ in range(2))
        assert first == second
        assert first[0] == 1437
        assert first[1] != os.getpid()
        with pytest.raises(InputError, match=r"slow library cannot be measured \(see above\)"):
            measure(fail, config)
    assert "RuntimeError: out of memory" in capfd.readouterr().err
