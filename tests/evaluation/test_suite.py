"""Suites are checked as a whole, expand into the cells that they say, and run to the same rows however they are run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from clipadapt.cli.app import app
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.evaluation.bench.run import read_rows, run_cell, run_suite
from clipadapt.evaluation.bench.suite import cells, load_suite, suites
from clipadapt.evaluation.report.page import write_report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = """
title: Small
data: [points.yaml]
protocols:
  few-shot: {shots: [1, 4]}
methods: [zero-shot, tip-adapter, {method: proker, label: proker-wide, set: {beta: 0.5}}]
seeds: [1, 2]
"""
POINTS = """
name: points
title: Points around three centres
layout: features
places: {one: [one.npz], two: [two.npz]}
classes: 3
settings: {cut: {val: 0.2, test: 0.4}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A suite on published features of two encoders."""
    rng = np.random.default_rng(0)
    for name, dim in (("one", 8), ("two", 12)):
        centres, labels = rng.standard_normal((3, dim)), np.repeat(np.arange(3), 20)
        np.savez(
            tmp_path / f"{name}.npz",
            image_features=centres[labels] + rng.standard_normal((60, dim)),
            labels=labels,
            class_names=np.array(["ant", "bee", "cat"]),
            mean_prompt_features=centres + rng.standard_normal((3, dim)),
        )
    (tmp_path / "points.yaml").write_text(POINTS)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def figures(rows):
    return {(r["backbone"], r["label"], r["options"]["shots"], r["seed"]): r["figures"] for r in rows}


def test_cells_are_the_product(folder):
    found = cells(load_suite(folder / "small.yaml"))
    assert len(found) == 2 * 2 * 3 * 2
    assert {c.backbone for c in found} == {"one", "two"}
    assert all(c.published for c in found)
    wide = next(c for c in found if c.label == "proker-wide")
    assert (wide.method, wide.hyperparameters["beta"]) == ("proker", 0.5)
    assert wide.options == {"shots": 1, "val": False, "search": False}


@pytest.mark.parametrize("name", suites())
def test_shipped_suites_are_valid(name):
    assert cells(load_suite(name, tiny=True))
    assert len(cells(load_suite(name))) >= len(cells(load_suite(name, tiny=True)))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("methods:", "methodes:", "Unknown field"),
        ("few-shot:", "few-shots:", "Unknown protocol"),
        ("shots:", "shoots:", "Unknown option of few-shot"),
        ("tip-adapter,", "tip-adaptr,", "tip-adapter"),
        ("beta: 0.5", "beta: -1", "out of range"),
        ("seeds:", "settings: {prokr: {}}\nseeds:", "Unknown method in the settings"),
        ("seeds:", "settings: {proker: {beta: -1}}\nseeds:", "out of range"),
        ("seeds:", "settings: [proker]\nseeds:", "settings must map"),
        ("shots: [1, 4]", "shots: 1, choose: {lr: 0.1}", "choose is {name of a hyper-parameter"),
        ("shots: [1, 4]", "shots: 1, choose: {lr: [xten]}", "'xten' is not a multiple"),
        ("points.yaml", "pointz", "Unknown data set"),
        ("title: Small", "title: [", "not valid YAML"),
        ("seeds: [1, 2]", "seeds: []", "seeds must be a list"),
        ("set: {beta: 0.5}", "steps_as: {shots: 8}", "steps_as of proker is"),
        ("set: {beta: 0.5}", "steps_as: {shots: 0, classes: 2}", "steps_as of proker is"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(folder, old, new, says):
    (folder / "small.yaml").write_text(SMALL.replace(old, new))
    with pytest.raises(ClipadaptError, match=says):
        load_suite(folder / "small.yaml")


def test_a_wrapped_method_is_set_as_recipes_name_it(folder):
    inner = "{method: {method: fine-tune, hyperparameters: {lr: 0.001}}}"
    (folder / "small.yaml").write_text(
        f"data: [digits]\nprotocols: few-shot\nseeds: [1]\nmethods: [{{method: wise-ft, set: {inner}}}]\n"
    )
    found = cells(load_suite(folder / "small.yaml"))[0].hyperparameters["method"]
    assert (found["method"], found["hyperparameters"]["lr"]) == ("fine-tune", 0.001)


def test_settings_of_a_suite_are_those_of_its_methods(folder):
    (folder / "small.yaml").write_text(
        SMALL + "settings: {proker: {beta: 0.7, alpha: 0.3}, tip-adapter: {alpha: 2.0}}\n"
    )
    found = {c.label: c.hyperparameters for c in cells(load_suite(folder / "small.yaml"))}
    assert found["tip-adapter"]["alpha"] == 2.0
    assert (found["proker-wide"]["beta"], found["proker-wide"]["alpha"]) == (0.5, 0.3), "`set` comes on top"


@pytest.mark.parametrize(
    ("suite", "results"),
    [
        ("few-shot", "few_shot"),
        ("few-shot-towers", "few_shot_towers"),
        ("playground-towers", "playground_towers"),
        ("transductive", "transductive"),
        ("adversarial_tecoa.yaml", "adversarial_tecoa"),
        ("whu_base_to_new.yaml", "whu_base_to_new"),
    ],
)
def test_recorded_results_are_those_of_the_suite(suite, results):
    """`clipadapt bench` with these results in DIR runs none of them again."""
    if not (BENCHMARKS / f"{results}.jsonl").exists():
        pytest.skip("recorded results are in the repository, not in the source distribution")
    recorded = read_rows(BENCHMARKS / f"{results}.jsonl")
    places = {
        (Path(r["data"]).stem, r["backbone"]): (r["data_fingerprint"], r["backbone_fingerprint"]) for r in recorded
    }
    of_suite = {
        cell.identity(*places[place])
        for cell in cells(load_suite(BENCHMARKS / suite if suite.endswith(".yaml") else suite))
        if (place := (Path(cell.data).stem, cell.backbone)) in places
    }
    assert {row["cell"] for row in recorded} <= of_suite


@pytest.mark.parametrize("file", ["prompts", "robust"])
def test_suites_of_the_repository_are_valid(file):
    assert cells(load_suite(BENCHMARKS / f"{file}.yaml"))
    assert cells(load_suite(BENCHMARKS / f"{file}.yaml", tiny=True))


def test_runs_resumes_and_gives_the_same_again(folder):
    suite = load_suite(folder / "small.yaml")
    told: list[str] = []
    rows = run_suite(suite, folder / "out", root=folder, jobs=2, threads=1, tell=told.append)
    assert len(rows) == 24
    assert all("figures" in row for row in rows)
    assert {"clipadapt", "torch", "git", "data_fingerprint", "backbone_fingerprint", "peak_mib"} <= rows[0].keys()
    environment = dict(os.environ)
    plain = [run_cell(cell, folder, 1) for cell in cells(suite)[:3]]
    assert dict(os.environ) == environment, "the caller's data root is put back"
    assert [row["figures"] for row in rows[:3]] == [row["figures"] for row in plain], "in a worker as here"

    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    (folder / "out" / "results.jsonl").write_text("\n".join(lines[:10]) + '\n{"cell": "cut o')
    told.clear()
    again = run_suite(suite, folder / "out", root=folder, tell=told.append)
    assert sum(line.startswith("[") for line in told) == 14, "ten were there, half a line is none"
    assert figures(again) == figures(rows)
    assert len(read_rows(folder / "out" / "results.jsonl")) == 24


def test_what_learns_nothing_is_run_once_and_gives_what_each_cell_would(folder):
    suite = load_suite(folder / "small.yaml")
    rows = run_suite(suite, folder / "out", root=folder, threads=1)
    for cell, row in zip(cells(suite), rows, strict=True):
        if cell.method == "zero-shot":
            plain = run_cell(cell, folder, 1)
            assert (row["figures"], row["per_class"]) == (plain["figures"], plain["per_class"])
            assert (row["seed"], row["options"]) == (cell.seed, cell.options)
    assert len({row["seconds"] for row in rows if row["label"] == "zero-shot"}) == 2, "one run for each backbone"
    assert len({row["cell"] for row in rows}) == len(read_rows(folder / "out" / "results.jsonl")) == 24


def test_equal_training(folder):
    """As many steps as with 10 x 8 = 80 images, whatever the shots; one epoch at least."""
    (folder / "small.yaml").write_text(
        "data: [playground-kinds]\nprotocols: {few-shot: {shots: [1, 8, 16]}}\nseeds: [1]\nsettings:\n"
        "  full-fine-tune: {epochs: 8, batch_size: 16}\n"
        "  wise-ft: {method: {method: fine-tune, hyperparameters: {epochs: 5, batch_size: 16}}}\n"
        "  clip-lora: {steps_per_shot: 5}\nmethods:\n"
        "- {method: '*', sees: towers, steps_as: {classes: 10, shots: 8}}\n"
    )
    found = {(c.label, c.options["shots"]): c.hyperparameters for c in cells(load_suite(folder / "small.yaml"))}
    assert [found["full-fine-tune", shots]["epochs"] for shots in (1, 8, 16)] == [20, 4, 2]  # 40 / 2, 9, 18 steps
    assert [found["wise-ft", shots]["method"]["hyperparameters"]["epochs"] for shots in (1, 16)] == [12, 1]
    assert [found["clip-lora", shots]["steps_per_shot"] for shots in (1, 8, 16)] == [40, 5, 2]
    assert found["tai-dpt", 1] == found["tai-dpt", 16], "it learns from sentences"
    suite = folder / "small.yaml"
    suite.write_text(suite.read_text().replace("few-shot: {shots: [1, 8, 16]}", "name-only"))
    with pytest.raises(DataError, match="steps_as needs shots and classes"):
        cells(load_suite(suite))


def test_a_killed_run_goes_on(folder):
    code = (
        "from pathlib import Path\nfrom clipadapt.evaluation.bench.suite import load_suite\n"
        "from clipadapt.evaluation.bench.run import run_suite\n"
        f"if __name__ == '__main__':\n    f = Path({str(folder)!r})\n"
        "    run_suite(load_suite(f / 'small.yaml'), f / 'out', root=f, threads=1)\n"
    )
    (folder / "go.py").write_text(code)
    file = folder / "out" / "results.jsonl"
    running = subprocess.Popen([sys.executable, str(folder / "go.py")], start_new_session=True)
    while running.poll() is None and not (file.exists() and file.read_text().count("\n") >= 3):
        time.sleep(0.05)
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = len(read_rows(file))
    assert before >= 3
    rows = run_suite(load_suite(folder / "small.yaml"), folder / "out", root=folder, threads=1)
    assert len(rows) == len(read_rows(file)) == 24


def test_what_is_broken_spoils_only_its_own_cells(folder):
    (folder / "absent.yaml").write_text(POINTS.replace("points", "absent").replace("one.npz", "no.npz"))
    (folder / "small.yaml").write_text(
        SMALL.replace("[points.yaml]", "[absent.yaml, points.yaml]")
        .replace("seeds:", "timeout: 600\nexclude: [proker]\nseeds:")
        .replace("tip-adapter,", "tip-adapter, coop,")
    )
    rows = run_suite(load_suite(folder / "small.yaml"), folder / "out", root=folder, threads=1)
    kinds = {(Path(r["data"]).stem, r["backbone"], r["label"]): r for r in rows}
    assert "no.npz" in kinds["absent", "one", "zero-shot"]["error"]
    assert "figures" in kinds["absent", "two", "zero-shot"]
    assert "needs a backbone with" in kinds["points", "one", "coop"]["skipped"]
    assert "figures" in kinds["points", "one", "tip-adapter"]


def test_a_cell_that_takes_too_long_is_given_up(folder):
    (folder / "small.yaml").write_text(SMALL + "timeout: 0.001\n")
    rows = run_suite(load_suite(folder / "small.yaml"), folder / "out", root=folder, threads=1)
    assert all("longer than 0.001 seconds" in row["error"] for row in rows)
    (folder / "small.yaml").write_text(SMALL)
    rows = run_suite(load_suite(folder / "small.yaml"), folder / "out", root=folder, threads=1)
    assert all("figures" in row for row in rows), "failed cells are tried again"


def test_only_one_cell(folder):
    suite = load_suite(folder / "small.yaml")
    rows = run_suite(suite, folder / "out", root=folder, threads=1)
    again = run_suite(suite, folder / "out", root=folder, threads=1, only=rows[5]["cell"])
    assert [row["cell"] for row in again] == [rows[5]["cell"]]
    assert again[0]["figures"] == rows[5]["figures"]
    with pytest.raises(ClipadaptError, match="has no cell"):
        run_suite(suite, folder / "out", root=folder, only="zzz")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="clipadapt")
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def test_command_and_report(folder):
    out = folder / "out"
    command = ["bench", folder / "small.yaml", "--out", out, "--data", folder]
    assert json.loads(run(*command, "--json").stdout)["cells"] == 24
    page = (out / "report.html").read_text()
    assert "<svg" in page
    for load in ("<script src", "<link", "<img", "@import", "url(http"):
        assert load not in page, "nothing is loaded from elsewhere"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    names = {file.stem for file in (out / "tables").glob("*.csv")}
    assert names == {file.stem for file in (out / "tables").glob("*.tex")}
    assert "ranks-few-shot" in names
    for file in (out / "figures").glob("*.svg"):
        assert file.with_suffix(".png").exists()
    first = (out / "tables" / "ranks-few-shot.md").read_text()
    run(*command)
    assert (out / "tables" / "ranks-few-shot.md").read_text() == first


def test_a_brief_report_says_the_same_and_writes_little(folder):
    rows = run_suite(load_suite(folder / "small.yaml"), folder / "out", root=folder, threads=1)
    whole = write_report(rows, folder / "whole", title="Small", command="bench").read_text()
    brief = write_report(rows, folder / "brief", title="Small", command="bench", cells_in="kept.jsonl").read_text()
    tables = [set(re.findall(r"<table>.*?</table>", page, re.DOTALL)) for page in (whole, brief)]
    assert tables[1] < tables[0]
    assert len(tables[0] - tables[1]) == 1, "all but that of every cell"
    assert "kept.jsonl" in brief
    written = {str(file.relative_to(folder / "brief")) for file in (folder / "brief").rglob("*.*")}
    assert written == {"report.html", *(f"tables/{file.name}" for file in (folder / "whole/tables").glob("*.csv"))} - {
        "tables/cells.csv"
    }
    assert set(re.findall(r'href="(tables/[^"]+|figures/[^"]+)"', brief)) == written - {"report.html"}
    assert len(brief) < len(whole) / 2
    drawn, exact = (
        sorted(float(n) for d in re.findall(r' d="([^"]*)"', text) for n in re.findall(r"-?\d+(?:\.\d+)?", d))
        for text in (whole, "".join(file.read_text() for file in (folder / "whole/figures").glob("*.svg")))
    )
    assert drawn == pytest.approx(exact, abs=0.0101), "outlines are rounded in the page, to what nobody sees"


def test_command_says_what_is_missing(folder):
    assert "Which suite" in run("bench", code=1).stderr
    assert "--out DIR" in run("bench", folder / "small.yaml", code=1).stderr
    assert "few-shot" in run("bench", "few-shots", "--out", folder / "o", code=1).stderr
    assert "few-shot" in run("bench", "--list").stdout


def test_damaged_results_are_not_read_as_whole(folder):
    (folder / "results.jsonl").write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(ClipadaptError, match="line 2 is damaged"):
        read_rows(folder / "results.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_suite(folder / "absent-suite.yaml")
