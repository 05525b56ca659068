"""The model card of an exported network: a README.md in the Hugging Face Hub's format.

Its metadata follow https://huggingface.co/docs/hub/model-cards. Every number comes from the run's record.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vit_lightning.config import ModelConfig
from vit_lightning.files import write_atomic
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.terminal import print_files, relative

HUB = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10"}  # names of data sets on the Hub
LICENCES = {  # licence identifiers on the Hub
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "unknown", "other"),
}
METRICS = {  # maps a record's names to the types and names of metrics on the Hub
    "loss": ("loss", "cross-entropy"),
    "acc": ("accuracy", "top-1 accuracy"),
    "acc5": ("accuracy", "top-5 accuracy"),
    "balanced_acc": ("accuracy", "balanced accuracy"),
    "f1": ("f1", "macro F1"),
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
NO_RECORD = "There is no record of the run that trained this network."
INTENDED = "Assigning images like those of the training data to one of the classes below."
LIMITS = """\
- Every image is assigned to one of the classes below, also one that shows none of them.
- The central square of an image is used; what is outside of it is not seen.
- The results are those of the images named above; other images were not measured.
"""
LOADING = {
    "model.safetensors": """\
from vit_lightning.recipe.weights import load_classifier

classifier = load_classifier("model.safetensors")
images = torch.zeros(1, {channels}, {size}, {size}, dtype=torch.uint8)
probabilities = classifier.classify(images)  # (1, {classes})
""",
    "model.pt2": """\
extra = {{"class_names": "", "config": ""}}
program = torch.export.load("model.pt2", extra_files=extra)
images = torch.zeros(1, {channels}, {size}, {size}, dtype=torch.uint8)
probabilities = program.module()(images).softmax(dim=1)  # (1, {classes})
""",
    "model.onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
images = torch.zeros(1, {channels}, {size}, {size}, dtype=torch.uint8)
[logits] = session.run(None, {{"images": images.numpy()}})
probabilities = torch.from_numpy(logits).softmax(dim=1)  # (1, {classes})
""",
    "config.json": """\
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()  # once uploaded, hf-hub:NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # of a picture
images = torch.zeros(1, {channels}, {size}, {size})
probabilities = model(images).softmax(dim=1)  # (1, {classes})
""",
}


def write_card(classifier: ViTClassifier, record: dict[str, Any], licence: str, model: Path) -> None:
    """Write ``README.md`` next to an exported network, unless it already exists.

    Args:
        classifier: the exported network.
        record: the ``summary.json`` of its run; ``{}`` if there is none.
        licence: what its weights may be used for: a licence identifier of the Hub, a sentence, or empty.
        model: the exported file, which is ``config.json`` for timm.
    """
    path = model.with_name("README.md")
    if path.exists():
        print(f"{relative(path)} already exists and was kept; delete it to write a new model card")
        return
    if len(classifier.hparams["class_names"]) <= 10:  # top-5 means little if it covers half of the classes
        metrics = {name: value for name, value in record.get("metrics", {}).items() if not name.endswith("/acc5")}
        record = {**record, "metrics": metrics} if record else record
    title, hub = data_of(classifier)
    header = yaml.safe_dump(header_of(record, licence, model, title, hub), sort_keys=False, allow_unicode=True)
    sections = {
        "": describe(classifier, title),
        "Intended use": INTENDED,
        "Loading": loading(classifier, model),
        "Training data": describe_data(classifier, record, title, hub),
        "Training": describe_training(record),
        "Results": describe_results(record),
        "Limits": LIMITS,
        "Licence": licence or "No licence is stated.",
        "Classes": indent(f"{number:>4}  {name}" for number, name in enumerate(classifier.hparams["class_names"])),
    }
    body = "\n".join(f"## {name}\n\n{text.rstrip()}\n" if name else text for name, text in sections.items())
    write_atomic(path, f"---\n{header}---\n\n{body}".encode(errors="backslashreplace"))
    print_files([path])


def header_of(record: dict[str, Any], licence: str, model: Path, title: str, hub: str | None) -> dict[str, Any]:
    """The card's metadata, with a model index of the results on the test images, or else the validation images."""
    tags = ["image-classification", "vision-transformer", *(["onnx"] if model.suffix == ".onnx" else ["pytorch"])]
    header: dict[str, Any] = {
        "license": licence if licence in LICENCES else "other" if licence else "unknown",
        "library_name": "timm" if model.name == "config.json" else "vit_lightning",
        "pipeline_tag": "image-classification",
        "tags": tags,
        **({"datasets": [hub]} if hub else {}),
    }
    metrics = record.get("metrics", {})
    split = "test" if "test/acc" in metrics else "val"
    measured = {key: metrics[f"{split}/{key}"] for key in names_of(metrics) if f"{split}/{key}" in metrics}
    if measured:
        kinds = {key: METRICS.get(key, (key, key)) for key in measured}
        header["metrics"] = list(dict.fromkeys(kind for kind, _ in kinds.values() if kind != "loss"))
        values = [{"type": kinds[key][0], "value": value, "name": kinds[key][1]} for key, value in measured.items()]
        dataset = {"name": title, "type": hub or record["config"]["data"]["source"], "split": SPLITS[split]}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": values}
        header["model-index"] = [{"name": f"ViT, {title}", "results": [result]}]
    return header


def data_of(classifier: ViTClassifier) -> tuple[str, str | None]:
    """The name of the training data, and their name on the Hub if they are there."""
    data = classifier.hparams["data"] or {"source": "unknown data"}
    source, name = data["source"], data.get("name")
    if source in ("image_folder", "npz"):
        name = Path(data["root"]).name
    return name or source, name if source == "huggingface" else HUB.get(source)


def names_of(metrics: dict[str, float]) -> list[str]:
    """The names of the metrics in a record, without their splits."""
    return list(dict.fromkeys(name.partition("/")[2] for name in metrics))


def describe(classifier: ViTClassifier, title: str) -> str:
    """Describe the network."""
    config, parameters = ModelConfig(**classifier.hparams["model"]), sum(p.numel() for p in classifier.net.parameters())
    P, S = config.patch_size, config.image_size
    return (
        f"# ViT, {title}\n\nA Vision Transformer that classifies images, exported by vit_lightning: {parameters:,} "
        f"parameters, {config.layers} blocks of width {config.embed_dim}, {config.heads} heads, patches of {P} × {P} "
        f"in {S} × {S} pixels of {config.channels} channel(s), {config.num_classes} classes.\n"
    )


def loading(classifier: ViTClassifier, model: Path) -> str:
    """Python code that loads the network, to be run in the directory of its files."""
    net = classifier.net
    code = LOADING[model.name].format(channels=net.channels, size=net.image_size, classes=net.head[-1].out_features)
    takes = "Images are uint8, of any number, height and width; they are cropped, resized and normalised inside."
    if model.name == "config.json":
        takes = "Images are normalised by the transform."
    return f"{takes}\n\n```python\nimport torch\n{code}```\n"


def describe_data(classifier: ViTClassifier, record: dict[str, Any], title: str, hub: str | None) -> str:
    """Describe the training data."""
    name = f"[{title}](https://huggingface.co/datasets/{hub})" if hub else title
    if not record:
        return f"{name}. {NO_RECORD}"
    counts = ", ".join(f"{count:,} {SPLITS[split]}" for split, count in record["images"].items())
    data = classifier.hparams["data"] or {}
    split = ", ".join(f"`data.{key}={data[key]}`" for key in ("split", "val_fraction", "split_seed") if key in data)
    return f"{name}: {counts} images ({split})."


def describe_training(record: dict[str, Any]) -> str:
    """Describe the training: command, commit, initial weights, time, machine and settings."""
    if not record:
        return NO_RECORD
    config, hardware = record["config"], record["hardware"]
    start = config.get("checkpoint")
    facts = {
        "commit": record["git_commit"] or "not known",
        "date": record["date"],
        "initial weights": f"`{start}`" if start else "random",
        "epochs": f"{record['epochs']}; the weights are those of epoch {record['best_epoch']}",
        "images seen": f"{record['samples_seen']:,}",
        "time": f"{record['seconds']:,.0f} s on {hardware['gpu'] or hardware['cpu']}",
        "seed": record["seed"],
        "libraries": ", ".join(f"{name} {version}" for name, version in record["libraries"].items()),
    }
    recipe = {name: config[name] for name in ("model", "data", "augment", "optim", "trainer")}
    lines = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    settings = indent(yaml.safe_dump(recipe, sort_keys=False).splitlines())
    return f"{indent([record['command']])}\n{lines}\n\nSettings:\n\n{settings}"


def describe_results(record: dict[str, Any]) -> str:
    """A table of the metrics of each split."""
    metrics = record.get("metrics", {})
    if not metrics:
        return NO_RECORD
    names = names_of(metrics)
    rows = [["images", *(METRICS.get(name, (name, name))[1] for name in names)], ["---"] * (1 + len(names))]
    for split, title in SPLITS.items():
        if any(name.startswith(f"{split}/") for name in metrics):
            values = [metrics.get(f"{split}/{name}") for name in names]
            rows.append([title, *("" if value is None else f"{value:.4f}" for value in values)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nMeasured by the run, before the export; the training metrics during the epoch, with augmentation. "
        "Unless the run validated only once, the validation images chose the epoch."
    )


def indent(lines: Iterable[str]) -> str:
    """Format lines as a code block, whatever they contain."""
    return textwrap.indent("\n".join(line.replace("\n", " ") for line in lines) + "\n", "    ")
