"""Evaluation agrees with the library, matches classes by name, and shows the worst first."""

import json
import shutil

import pytest

import clipadapt


def test_figures_are_the_librarys(run, model, photos):
    document = json.loads(run("evaluate", model, photos, "--json").stdout)
    data = clipadapt.image_folder(photos)
    assert document["images"] == len(data)
    assert document["accuracy"] == pytest.approx(clipadapt.load(model).score(data))
    assert document["macro_accuracy"] == pytest.approx(sum(c["accuracy"] for c in document["classes"]) / 4)
    recalls = [row["accuracy"] for row in document["classes"]]
    assert recalls == sorted(recalls)
    wrong = sum(row["count"] for row in document["confusions"])
    assert wrong == round((1 - document["accuracy"]) * len(data))


def test_classes_are_matched_by_name(run, model, photos, tmp_path):
    whole = json.loads(run("evaluate", model, photos, "--json").stdout)
    shutil.copytree(photos / "yellow", tmp_path / "some" / "yellow")
    shutil.copytree(photos / "green", tmp_path / "some" / "green")
    some = json.loads(run("evaluate", model, tmp_path / "some", "--json").stdout)
    recall = {row["class"]: row["accuracy"] for row in whole["classes"]}
    assert {row["class"]: row["accuracy"] for row in some["classes"]} == {k: recall[k] for k in ("yellow", "green")}

    (tmp_path / "some" / "green").rename(tmp_path / "some" / "greem")
    error = run("evaluate", model, tmp_path / "some", code=1).stderr
    assert "Unknown class of this model 'greem'; did you mean 'green'" in error


def test_tables_show_the_worst_classes_unless_asked_for_all(run, model, photos, monkeypatch):
    monkeypatch.setattr("clipadapt.cli.evaluate.SHOWN_CLASSES", 3)
    few = run("evaluate", model, photos).stdout
    assert "accuracy" in few
    assert "on 32 images" in few
    assert "1 class did better; --all shows them." in few
    assert "did better" not in run("evaluate", model, photos, "--all").stdout


def test_skipped_images_do_not_count(run, model, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "damaged")
    broken = next((tmp_path / "damaged" / "red").iterdir())
    broken.write_bytes(b"no image")
    assert str(broken) in run("evaluate", model, tmp_path / "damaged", code=1).stderr
    document = json.loads(run("evaluate", model, tmp_path / "damaged", "--on-error", "skip", "--json").stdout)
    assert document["unreadable"] == [str(broken)]
    assert document["images"] == 31
