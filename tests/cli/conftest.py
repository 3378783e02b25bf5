"""A small folder of images, a tiny backbone, and a model adapted from the one to the other by the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from clipadapt.cli.app import app
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="session")
def backbone() -> str:
    return str(tiny_clip())


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Four colours, eight images each, in a folder per class."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    data = colours(per_class=8, seed=1)
    for index, (item, label) in enumerate(zip(data.items, data.labels, strict=True)):
        file = folder / data.class_names[label] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        item.open().save(file)
    return folder


@pytest.fixture(scope="session")
def run():
    """Run `clipadapt` in this process on the arguments given; the result has stdout, stderr and exit_code."""

    def invoke(*args, code=0):
        result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="clipadapt")
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        return result

    return invoke


@pytest.fixture(scope="session")
def model(run, photos, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "colours-model"
    run("adapt", photos, "--backbone", backbone, "--method", "tip-adapter", "--shots", 5, "--out", folder)
    return folder
