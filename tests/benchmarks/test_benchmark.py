"""The benchmark command, at sizes that take seconds. What it measures is not asserted: that is the machine's."""

import json
import re
import subprocess
import sys

import pytest
from conftest import composed
from PIL import Image

from vit_lightning.benchmarks.benchmark import benchmark, spread, training_flops
from vit_lightning.config import ModelConfig
from vit_lightning.keys import InputError
from vit_lightning.schemas import BenchmarkRun

SMALL = [
    "model.image_size=12",
    "model.patch_size=4",
    "model.layers=2",
    "model.embed_dim=8",
    "model.mlp_head_units=[16]",
]


@pytest.mark.slow
def test_the_command_measures_prints_and_keeps(tmp_path):
    times = ["benchmark.rounds=2", "benchmark.steps=2", "benchmark.warmup=1", "data.batch_size=8"]
    command = [sys.executable, "-m", "vit_lightning.benchmark", "data=digits", "augment=shift", *SMALL, *times]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # A loader worker of the tutorial's script may abort as it is stopped (one in thousands), which torch reports.
    assert not re.search("Warning|error:", result.stderr)
    [path] = tmp_path.glob("outputs/*/*/benchmark.json")
    report = json.loads(path.read_text())
    for group, contestants in report["speeds"].items():
        assert {"vit_lightning"} < contestants.keys(), group
        for name, speed in contestants.items():
            assert len(speed["values"]) == 2
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]
            assert f"{speed['median']:,.0f}" in result.stdout
            assert name.split()[0] in result.stdout
    assert [point["layers"] for point in report["step_seconds"]["layers"]] == [1, 2, 3, 4]
    assert [point["batch"] for point in report["step_seconds"]["batch"]] == [2, 4, 8, 16]
    assert [point["tokens"] for point in report["step_seconds"]["tokens"]] == [2, 5, 10, 17]
    shares = report["step_shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert any("attention" in name for name in shares)
    assert all(f"{share:.1%}" in result.stdout for share in shares.values())
    assert 10**8 < report["peak_memory_bytes"] < 10**10
    assert report["start_up_seconds"].keys() == {"--help", "--cfg job", "a mistake"}
    assert report["command"].startswith("python -m vit_lightning.benchmark data=digits")
    Image.open(path.with_name("benchmark.png")).verify()
    assert sorted(file.name for file in path.parent.iterdir() if file.is_file()) == ["benchmark.json", "benchmark.png"]


def test_flops_are_those_of_the_matrix_products():
    """Counted by hand: twice a multiplication, three times the forward pass less the images' own gradient."""
    config = ModelConfig(
        image_size=8,
        patch_size=4,
        channels=1,
        num_classes=3,
        embed_dim=6,
        heads=2,
        layers=1,
        mlp_dim=10,
        mlp_head_units=[],
    )
    N, D, M = 5, 6, 10
    patches = 4 * 16 * D
    keys, query, attention, out = N * D * 2 * D, D * D, 2 * N * D, D * D  # for the class token's one query
    rest = 2 * D * M + 3 * D
    assert training_flops(config) == 2 * (2 * patches + 3 * (keys + query + attention + out + rest))


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


def test_a_comparison_that_cannot_be_made_is_refused(tmp_path):
    for override in ("model=blog", "trainer.precision=bf16-mixed"):
        with pytest.raises(InputError, match=r"model\.block=prenorm at trainer\.precision=32-true"):
            benchmark(composed(override, name="benchmark"), tmp_path)


def test_defaults_of_conf_and_schema_agree():
    assert composed(name="benchmark") == BenchmarkRun()
