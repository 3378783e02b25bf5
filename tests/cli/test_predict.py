"""Predictions as tables and JSON lines; some images that fail do not stop the others."""

import json
import shutil

import clipadapt


def test_a_image_is_named(run, model, photos):
    image = sorted((photos / "red").iterdir())[0]
    (line,) = run("predict", model, image, "--json").stdout.splitlines()
    answer = json.loads(line)
    probabilities = clipadapt.load(model).predict_proba([image])[0]
    assert answer["file"] == str(image)
    assert len(answer["predictions"]) == 3
    best = answer["predictions"][0]
    assert best["class"] == clipadapt.load(model).class_names_[probabilities.argmax()]
    assert abs(best["probability"] - probabilities.max()) < 1e-6


def test_a_folder_means_its_images(run, model, photos, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("predict", model, photos, "--top", 1)
    for image in photos.rglob("*.png"):
        assert str(image) in result.stdout


def test_more_classes_than_there_are_is_all_of_them(run, model, photos):
    line = run("predict", model, next((photos / "red").iterdir()), "--top", 99, "--json").stdout
    predictions = json.loads(line)["predictions"]
    assert {guess["class"] for guess in predictions} == {"blue", "green", "red", "yellow"}
    assert abs(sum(guess["probability"] for guess in predictions) - 1) < 1e-5


def test_unreadable_images_are_reported_and_the_rest_is_predicted(run, model, photos, tmp_path):
    good, bad, missing = next((photos / "red").iterdir()), tmp_path / "bad.jpg", tmp_path / "missing.jpg"
    bad.write_bytes(b"")
    result = run("predict", model, bad, good, missing, "--json", code=1)
    first, second, third = map(json.loads, result.stdout.splitlines())
    assert first == {"file": str(bad), "error": f"{bad} is empty (0 bytes); an image file is needed."}
    assert len(second["predictions"]) == 3
    assert "No such file" in third["error"]
    assert "2 images of 3 could not be read" in result.stderr


def test_only_unreadable_images_and_empty_folders(run, model, tmp_path):
    assert run("predict", model, tmp_path / "missing.jpg", code=1).stdout == ""
    assert f"{tmp_path} holds no images" in run("predict", model, tmp_path, code=1).stderr


def test_names_are_shown_as_they_are(run, model, photos, tmp_path):
    odd = tmp_path / "[bold]odd[red].png"
    shutil.copy(next((photos / "red").iterdir()), odd)
    assert "[bold]odd[red].png" in run("predict", model, odd).stdout.replace("\n", "")
