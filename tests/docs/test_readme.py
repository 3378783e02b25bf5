"""The README is short, and its command line and its Python give the same model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from typer.testing import CliRunner

import clipadapt
from clipadapt.cli.app import app
from clipadapt.data import Playground

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    """The fenced block behind a marker."""
    found = re.search(rf"^<!-- {marker} -->\n```\w+\n(.*?)^```$", README, re.M | re.S)
    assert found, f"the README has no block marked {marker!r}"
    return found[1]


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_it_has_one_way_to_run_the_tests():
    """`.ci/run` takes the line that begins with `pip install`."""
    (line,) = block("test command").splitlines()
    assert re.fullmatch(r"pip install -e '\.\[test\]' && python -m pytest\b.*", line)


def test_command_line_and_python_give_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Playground().dataset(24, kinds=("cat", "fish", "house"))
    for number, (item, label) in enumerate(zip(data.items, data.labels, strict=True)):
        folder = Path("photos" if number % 24 < 20 else "more-photos", data.class_names[label])
        folder.mkdir(parents=True, exist_ok=True)
        item.open().save(folder / f"{number:03}.png")
    shutil.copy(next(Path("more-photos/fish").iterdir()), "new.jpg")

    def run(line: str) -> str:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
        return result.stdout

    adapt, predict, evaluate = block("command line").splitlines()
    run(adapt)
    by_command = json.loads(Path("pets/config.json").read_text())
    predicted = json.loads(run(f"{predict} --json"))["predictions"][0]["class"]
    accuracy = json.loads(run(f"{evaluate} --json"))["accuracy"]
    shutil.rmtree("pets")

    names: dict = {}
    exec(block("Python"), names)
    model = names["model"]
    assert json.loads(Path("pets/config.json").read_text()) == by_command
    assert model.class_names_[model.predict(["new.jpg"])[0]] == predicted
    assert model.score(clipadapt.image_folder("more-photos/")) == accuracy
