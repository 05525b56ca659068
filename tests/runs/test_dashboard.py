"""What TensorBoard shows of a run: in its files, and in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TRAINER, command, composed
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard import SummaryWriter

from vit_lightning.data.module import ImageData
from vit_lightning.recipe.weights import load_classifier
from vit_lightning.runs.dashboard import Dashboard, hyper_parameters, run_name

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
PICTURES = {"batch", "patches", "positions", "attention", "mistakes", "confusion", "per_class", "reliability"}


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_a_run_leaves_pictures_and_text(digits_run):
    shown = events(digits_run)
    assert {tag.removeprefix("pictures/") for tag in shown.Tags()["images"]} == PICTURES
    for tag in shown.Tags()["images"]:
        [image] = shown.Images(tag)
        assert image.width > 300
    texts = {tag.removesuffix("/text_summary") for tag in shown.Tags()["tensors"] if tag.endswith("/text_summary")}
    assert texts == {"command", "config", "network", "step"}
    [text] = shown.Tensors("command/text_summary")
    assert b"python -m vit_lightning.train experiment=quickstart" in text.tensor_proto.string_val[0]


def test_scalars_come_in_groups(digits_run):
    shown = events(digits_run)
    tags = set(shown.Tags()["scalars"])
    curves = {f"{chart}{stage}" for stage in ("train", "val") for chart in ("accuracy/top1_", "loss/")}
    curves |= {"loss/train_step"}
    assert curves | {"speed/images_per_second", "speed/memory_gb", "optim/gradient_norm", "optim/lr"} <= tags
    [*_, latest] = shown.Scalars("accuracy/best_val")
    assert latest.value == max(event.value for event in shown.Scalars("accuracy/top1_val"))
    groups = sorted({tag.split("/")[0] for tag in tags})  # in TensorBoard's order: the first two are open
    assert groups == ["accuracy", "loss", "optim", "speed", "summary"]


def test_the_table_names_a_run_by_its_settings_and_directory(digits_run):
    [start] = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
        for file in digits_run.glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    ]
    assert start.group_name.startswith("trainer.max_epochs=6 ")
    assert start.group_name.endswith(f"experiment=quickstart ({digits_run.name})")
    assert {"model.layers", "optim.lr", "data.source", "seed"} <= set(start.hparams)
    assert not {"data.root", "data.cache_dir", "data.workers", "trainer.enable_progress_bar"} & set(start.hparams)


def test_curves_alone_if_asked(digits_run):
    start = digits_run.parent
    small = ["trainer.max_epochs=1", "model.layers=1", "hydra.run.dir=plain"]
    assert command("train", "experiment=quickstart", "dashboard=curves", *small, cwd=start).returncode == 0
    tags = events(start / "plain").Tags()
    assert tags["images"] == []
    assert "accuracy/top1_val" in tags["scalars"]
    assert not [tag for tag in tags["tensors"] if tag.endswith("/text_summary")]


@pytest.mark.parametrize("picture", sorted(PICTURES))
def test_each_picture_can_be_left_out(picture, digits_run, tmp_path, monkeypatch):
    """The pictures of a finished run, drawn again with one of them switched off."""
    config = composed("experiment=quickstart", f"dashboard.{picture}=false")
    data = ImageData(config.data, config.model.image_size)
    data.setup()
    classifier = load_classifier(str(digits_run)).train()
    dashboard = Dashboard(config, data, "", {}, Figure())
    trainer = L.Trainer(**{**TRAINER, "logger": TensorBoardLogger(tmp_path, name="", version="")})
    shown = []
    monkeypatch.setattr("vit_lightning.runs.dashboard.show", lambda writer, name, figure, step: shown.append(name))
    dashboard.on_fit_start(trainer, classifier)
    dashboard.on_train_batch_start(trainer, classifier, next(iter(data.train_dataloader())), 0)
    record = json.loads((digits_run / "summary.json").read_text())
    dashboard.show_best(classifier.eval(), trainer, record)
    assert set(shown) == PICTURES - {picture}


def test_a_picture_that_fails_costs_one_line_and_nothing_else(digits_run, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ZeroDivisionError("nothing\nto show")

    monkeypatch.setattr("vit_lightning.runs.dashboard.draw_attention", fail)
    monkeypatch.setattr("vit_lightning.analysis.predictions.draw_per_class", fail)
    config = composed("experiment=quickstart")
    data = ImageData(config.data, config.model.image_size)
    data.setup()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = L.Trainer(**{**TRAINER, "logger": logger})
    record = json.loads((digits_run / "summary.json").read_text())
    dashboard = Dashboard(config, data, "", {}, Figure())
    dashboard.log_best(trainer, record)
    dashboard.show_best(load_classifier(str(digits_run)), trainer, record)
    assert capsys.readouterr().err.splitlines() == [
        "warning: cannot draw attention (ZeroDivisionError: nothing)",
        "warning: cannot draw per_class (ZeroDivisionError: nothing)",
    ]
    logger.experiment.flush()
    shown = events(tmp_path)
    assert "summary/test_acc" in shown.Tags()["scalars"]
    drawn = {tag.removeprefix("pictures/") for tag in shown.Tags()["images"]}
    assert drawn == PICTURES - {"batch", "patches", "attention", "per_class"}


def test_mixed_images_are_titled_with_their_shares(digits_config):
    data = ImageData(digits_config, 8)
    data.setup()
    dashboard = Dashboard(composed("data=digits"), data, "", {}, Figure())
    assert dashboard._title(torch.tensor(7)) == "7"
    mixed = torch.zeros(10)
    mixed[3], mixed[8] = 0.25, 0.75
    assert dashboard._title(mixed) == "8 75%\n3 25%"
    assert dashboard._title(torch.eye(10)[4]) == "4 100%"


@pytest.fixture(scope="module")
def server(digits_run, tmp_path_factory):
    """The address of a TensorBoard server on a directory with a run, and one of another learning rate, just begun."""
    outputs = tmp_path_factory.mktemp("outputs")
    shutil.copytree(digits_run, outputs / "digits")
    config = composed("experiment=quickstart", "optim.lr=0.0625")
    with SummaryWriter(outputs / "other") as writer:
        writer._get_file_writer().add_summary(hparams_pb(hyper_parameters(config), trial_id="optim.lr=0.0625"))
        writer.add_scalar("accuracy/best_val", 0.0078125, 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(outputs), "--port", "0", "--host", "127.0.0.1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stderr:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield address.group()
                break
        else:
            pytest.fail("TensorBoard did not start")
    finally:
        process.terminate()
        process.communicate()


def test_names_that_are_not_valid_unicode_are_shown_escaped():
    latin = os.fsdecode(b"caf\xe9")
    assert run_name([f"data.name={latin}"], Path(latin)) == r"data.name=caf\xe9 (caf\xe9)"
    assert hyper_parameters(composed(f"data.name='{latin}'"))["data.name"] == r"caf\xe9"


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None and "REQUIRE_BROWSER" not in os.environ, reason="needs Chromium (apt-get install chromium)"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_browser_finds_curves_hyper_parameters_and_pictures(server, digits_run, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    assert BROWSER, "there is no Chromium"
    screenshots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    expect.set_options(timeout=60_000)  # on a busy machine
    with sync_playwright() as playwright:
        # Root, as in a container, gets no sandbox; the server is our own.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[*quiet, "--no-sandbox", "--no-first-run"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})

        def show(tab: str) -> None:
            page.goto("about:blank")
            page.goto(f"{server}/#{tab}")

        show("timeseries")
        tags = page.get_by_role("combobox", name="Filter tags (regex)")
        curves = ("loss/train", "accuracy/top1_val")
        for tag in (*curves, "optim/gradient_norm", "optim/lr", "speed/images_per_second"):
            tags.fill(f"^{tag}$")
            expect(page.locator("scalar-card:visible").filter(has_text=f"/{tag.split('/')[1]}")).to_have_count(1)
        tags.fill("^accuracy/")
        expect(page.locator("scalar-card:visible")).to_have_count(3)
        tags.press("Escape")  # its suggestions
        page.screenshot(path=screenshots / "scalars.png")

        show("custom_scalars")
        for chart in ("loss", "top-1"):
            expect(page.get_by_text(chart, exact=True)).to_be_visible()
        expect(page.get_by_text("Matches (2)", exact=True)).to_have_count(2)  # training and validation in each
        page.screenshot(path=screenshots / "custom_scalars.png")

        show("hparams")
        for column in ("optim.lr", "accuracy/best_val", "accuracy/top1_train", "accuracy/top1_val"):
            expect(page.locator("vaadin-grid").get_by_text(column, exact=True).first).to_be_attached()
        expect(page.get_by_text("hp_metric")).to_have_count(0)
        for value in ("0.0625", "0.0030000", "0.0078125"):  # the rates of both runs, and the other one's accuracy
            expect(page.locator("vaadin-grid").get_by_text(value).first).to_be_visible()
        best = json.loads((digits_run / "summary.json").read_text())["metrics"]["val/acc"]
        expect(page.get_by_text(f"{best:.4f}"[:5]).first).to_be_visible()
        page.screenshot(path=screenshots / "hparams.png")

        show("images")
        pictures = page.locator("tf-image-loader img")
        expect(pictures).to_have_count(len(PICTURES))
        for number in range(len(PICTURES)):
            picture = pictures.nth(number)
            picture.scroll_into_view_if_needed()
            expect(picture).to_have_js_property("complete", True)
            assert picture.evaluate("image => image.naturalWidth") > 300
        page.screenshot(path=screenshots / "images.png")
        browser.close()
    assert all((screenshots / f"{tab}.png").stat().st_size > 10_000 for tab in ("scalars", "hparams", "images"))
