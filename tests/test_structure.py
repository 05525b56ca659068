"""The structure of the package: which way imports go, and what an installed wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_lightning"
WINGS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
# Which sub-packages each one may import from, besides itself and the modules at the top of the package.
ALLOWED = {
    "model": set(),
    "data": set(),
    "recipe": {"model", "data"},
    "analysis": {"model", "data", "recipe"},
    "runs": {"model", "data", "recipe", "analysis"},
    "sweeps": {"runs", "analysis", "recipe"},
    "benchmarks": {"model", "data", "recipe", "analysis"},
}
OPTIONAL = {
    "optuna",
    "sqlalchemy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "timm",
    "vit_pytorch",
    "transformers",
    "datasets",
    "litdata",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """The modules that a file imports, and whether at its top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "vit_lightning" else node.module
                     for alias in node.names]  # fmt: skip
            found += [(name, id(node) in top) for name in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    wing = path.parent.name if path.parent != PACKAGE else None
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "vit_lightning" or len(parts) < 2:
            continue
        if wing is not None:
            assert parts[1] not in ("cli", "arguments", "messages"), f"{path} imports the command line"
            assert parts[1] in {wing, *ALLOWED[wing]} or parts[1] not in WINGS, f"{path} imports {module}"
        else:  # commands name their task as a string, and what lies below is imported once that runs
            assert parts[1] not in WINGS or path.name == "sweep.py", f"{path} imports {module}"


def test_a_network_needs_the_schema_alone():
    for path in (PACKAGE / "model").glob("*.py"):
        ours = {module for module, _ in imports(path) if module.startswith("vit_lightning")}
        schema = {f"vit_lightning.{name}" for name in ("config", "keys", "register")}
        assert {module for module in ours if not module.startswith("vit_lightning.model")} <= schema


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_import_nothing_but_optional_libraries(path):
    for module, top in imports(path):
        assert top or module.split(".")[0] in OPTIONAL | {"resource"}, f"{path} imports {module} in a function"


@pytest.mark.slow
def test_every_command_works_from_a_wheel(tmp_path):
    """Installed beside the libraries that are there, away from the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel: {layers: 3}\n")

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert str(tmp_path) in run("vit_lightning.train", "--cfg", "hydra", "-p", "hydra.runtime.cwd")
    for name in ("evaluate", "export", "search", "benchmark"):
        assert "seed" in run(f"vit_lightning.{name}", "--cfg", "job") or name in ("evaluate", "export")
    config = run("vit_lightning.train", "--config-dir", "mine", "experiment=mine", "--cfg", "job", "-p", "model")
    assert "layers: 3" in config
    small = ["model.layers=1", "model.image_size=8", "model.patch_size=4", "trainer.max_epochs=1"]
    assert "test" in run("vit_lightning.train", "experiment=quickstart", *small, "trainer.limit_train_batches=1")
