"""adapt, predict and evaluate where an image can show several classes."""

from __future__ import annotations

import csv
import json

import pytest

import clipadapt
from clipadapt.data import Playground

KINDS = ("star", "cat", "heart", "house")


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """40 playground images with one to three kinds each, in a folder with labels.csv."""
    folder = tmp_path_factory.mktemp("several")
    data = Playground(kinds=KINDS, size=48).multilabel(40)
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for number, (item, label) in enumerate(zip(data.items, data.labels, strict=True)):
            item.open().save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", ";".join(data.class_names[c] for c in sorted(label))])
    return folder


@pytest.fixture(scope="session")
def model(run, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "several-model"
    result = run("adapt", table, "--multi-label", "--method", "linear-probe", "--shots", 8, "--out", folder, "--json")
    return folder, json.loads(result.stdout)


def test_adapt(model, table):
    folder, document = model
    assert document["data"]["multi_label"]
    assert document["method"] == "linear-probe"
    held_out = document["held_out"]
    assert held_out["images"] + document["data"]["support"] == 40
    for side in ("zero_shot", "adapted"):
        assert held_out[side].keys() == {"mAP", "OF1", "CF1"}
        assert all(0 <= value <= 1 for value in held_out[side].values())
    loaded = clipadapt.load(folder)
    assert loaded.multi_label_
    support = clipadapt.image_table(table, multi_label=True).few_shot(8, seed=1)  # the same through the library
    again = clipadapt.create("linear-probe").fit(loaded.backbone_, support)
    assert again.threshold_ == loaded.threshold_


def test_auto_compares_by_map(run, table, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        "clipadapt.evaluation.selection.list_methods", lambda: ["tip-adapter", "linear-probe", "zero-shot"]
    )
    out = tmp_path / "model"
    document = json.loads(run("adapt", table, "--multi-label", "--shots", 8, "--out", out, "--json").stdout)
    trials = {trial["method"]: trial["accuracy"] for trial in document["trials"]}
    assert trials.keys() == {"zero-shot", "linear-probe"}, "tip-adapter has one class an image"
    assert document["method"] == max(trials, key=trials.get)
    shown = run("adapt", table, "--multi-label", "--shots", 8, "--out", out).stdout
    assert "mAP" in shown
    assert "OF1" in shown
    assert "highest mAP" in shown or "no method did better" in shown


def test_predict_names_what_is_there(run, model, table):
    folder, _ = model
    lines = [json.loads(line) for line in run("predict", folder, table, "--top", 4, "--json").stdout.splitlines()]
    assert len(lines) == 40
    shown = {row["class"] for line in lines for row in line["predictions"]}
    assert shown <= set(KINDS)
    assert {len(line["predictions"]) for line in lines} - {1}, "not each image has one class"
    assert all(row["probability"] >= 0.5 for line in lines for row in line["predictions"])
    fitted = clipadapt.load(folder)
    image = fitted.predict([table / "3.png"])[0]
    (line,) = [line for line in lines if line["file"].endswith("/3.png")]
    assert {row["class"] for row in line["predictions"]} == {fitted.class_names_[c] for c in image.nonzero()[0]}


def test_evaluate(run, model, table, monkeypatch):
    folder, _ = model
    document = json.loads(run("evaluate", folder, table, "--json").stdout)
    data = clipadapt.image_table(table, multi_label=True)
    assert document["mAP"] == pytest.approx(clipadapt.load(folder).score(data))
    assert {row["class"] for row in document["classes"]} == set(KINDS)
    precisions = [row["average_precision"] for row in document["classes"]]
    assert precisions == sorted(precisions)
    monkeypatch.setenv("COLUMNS", "200")
    assert "average precision" in run("evaluate", folder, table).stdout


def test_refusals(run, photos, table, tmp_path):
    result = run("adapt", photos, "--multi-label", "--out", tmp_path / "m", code=1)
    assert "labels.csv" in result.stderr
    result = run("adapt", table, "--multi-label", "--method", "tip-adapter", "--out", tmp_path / "m", code=1)
    assert "tip-adapter learns from images of one class each" in result.stderr
    result = run("adapt", table, "--multi-label", "--root", tmp_path, "--out", tmp_path / "m", code=1)
    assert "--multi-label reads a table" in result.stderr
