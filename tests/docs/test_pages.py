"""The pages and the examples are true: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import typer

from clipadapt.cli.app import app
from clipadapt.data import Playground
from clipadapt.methods.catalogue import cards
from tests.processes import FORKED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OTHERS = {"add-a-method.md"}  # its code is a method's file, which test_add_a_method.py tries

CLASSES = ("cat", "fish", "house", "star")

# What a page's reader is taken to have in addition to photos/.
AT_HAND = {
    "README.md": "import numpy, shutil; shutil.copytree('photos', 'more-photos'); labels = [0, 1, 2, 3]; "
    "image_features = text_features = other_features = numpy.random.default_rng(0).normal(size=(4, 8))"
}


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line number from 0, text) of a page's fenced blocks in one language."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, block.start(1)), block.group(1)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder with what the pages take for granted: photos/, and the same images listed or packed in other forms."""
    folder = tmp_path_factory.mktemp("pages")
    data = Playground().dataset(12, kinds=CLASSES)
    paths, labels = [], [CLASSES[label] for label in data.labels]
    for number, (item, label) in enumerate(zip(data.items, labels, strict=True)):
        paths.append(f"photos/{label}/{number:03}.png")
        (folder / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        item.open().save(folder / paths[-1])
    rows = list(zip(paths, labels, strict=True))
    with open(folder / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *rows])
    entries = [[path, CLASSES.index(label), label] for path, label in rows]
    parts = {"train": entries[0::3], "val": entries[1::3], "test": entries[2::3]}
    (folder / "split_zhou_Photos.json").write_text(json.dumps(parts))
    with tarfile.open(folder / "photos-000.tar", "w") as shard:
        for number, (path, label) in enumerate(rows):
            (folder / "label.cls").write_text(label)
            shard.add(folder / path, f"{number:03}.png")
            shard.add(folder / "label.cls", f"{number:03}.cls")
    data.items[0].open().save(folder / "new.jpg")
    return folder


def run(script: str, folder: str, *arguments: str) -> str:
    """Run a script in a folder; gives what it printed."""
    os.chdir(folder)
    sys.argv = [script, *arguments]
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def run_apart(script: Path, folder: Path, *arguments: str) -> str:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, FORKED) as pool:
        return pool.submit(run, str(script), str(folder), *arguments).result(timeout=300)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OTHERS and list(blocks(p, "python"))], ids=name_of)
def test_code_on_the_page_runs(page, photos, tmp_path):
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())  # so that a traceback names the page's own lines
    lines[0] = AT_HAND.get(name_of(page), "")
    for start, code in blocks(page, "python"):
        lines[start : start + code.count("\n")] = code.splitlines()
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(lines))
    run_apart(script, shutil.copytree(photos, tmp_path / "work"))


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example, tmp_path):
    assert "%" in run_apart(example, tmp_path)  # each reports an accuracy


# -- commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    for _, block in blocks(page, "sh"):
        yield from re.findall(r"^clipadapt .*", block.replace("\\\n", " "), re.M)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_of_the_program(page):
    for line in commands(page):
        command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page.name} has {line!r}, and there is no command {words[0]!r}"
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # raises on an unknown option or a wrong value


# -- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What GitHub lets one link to on a page: its headings, in small letters, with hyphens."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name} links to {target}, which does not exist"
            assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index
    for example in EXAMPLES:
        assert f"({os.path.relpath(example, ROOT / 'docs')})" in index


# -- what is made by a script ----------------------------------------------------------------------------------------


def test_the_catalogue_is_that_of_the_cards(tmp_path):
    run_apart(ROOT / "docs" / "make_catalogue.py", tmp_path, "methods.md")
    made, kept = (tmp_path / "methods.md").read_text(), (ROOT / "docs" / "methods.md").read_text()
    assert made == kept, "docs/methods.md is not up to date; run: python docs/make_catalogue.py"


def test_every_method_has_a_row_of_evidence():
    """`zero-shot` is what the others are compared with."""
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "evidence.md").read_text(), re.MULTILINE)
    assert set(rows) == set(cards()) - {"zero-shot"}
