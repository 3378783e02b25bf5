"""The main job on a tiny folder: what is drawn, saved, shown, refused."""

import json
import shutil

import pytest

import clipadapt
from clipadapt.cli.adapt import parse_value
from clipadapt.cli.adaptation import MAX_HELD_OUT, draw
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.methods.artifact import recipe


@pytest.fixture
def adapt(run, photos, backbone, tmp_path):
    """`clipadapt adapt` on the photos, with a method that needs no time."""

    def invoke(*args, source=photos, method="tip-adapter", out=tmp_path / "model", code=0):
        return run("adapt", source, "--backbone", backbone, "--method", method, "--out", out, *args, code=code)

    return invoke


def test_a_folder_becomes_a_model_better_than_zero_shot(adapt, photos, tmp_path):
    result = adapt("--shots", 5, "--json")
    document = json.loads(result.stdout)
    assert document["method"] == "tip-adapter"
    assert document["data"]["support"] == 20
    assert document["held_out"]["images"] == 12
    adapted, zero_shot = document["held_out"]["adapted"], document["held_out"]["zero_shot"]
    assert adapted["accuracy"] > zero_shot["accuracy"]
    assert adapted["interval"][0] <= adapted["accuracy"] <= adapted["interval"][1]
    assert document["bytes"] == sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert "colours: 32 images of 4 classes" in result.stderr

    model = clipadapt.load(tmp_path / "model")
    support = clipadapt.image_folder(photos).few_shot(5, seed=1)  # the same images as through the library
    again = clipadapt.create("tip-adapter").fit(model.backbone_, support)
    assert again.keys_.equal(model.keys_)


def test_tables_name_the_figures_the_place_and_the_next_command(adapt, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = adapt("--shots", 5)
    assert "Check on 12 held-out images" in result.stdout
    assert "adapted (tip-adapter)" in result.stdout
    assert f"Model saved to {tmp_path / 'model'} (" in result.stdout
    assert f"clipadapt predict {tmp_path / 'model'} photo.jpg" in result.stdout


def test_auto_compares_and_marks_the_best(run, photos, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("clipadapt.evaluation.selection.list_methods", lambda: ["tip-adapter", "linear-probe"])
    command = ("adapt", photos, "--backbone", backbone, "--shots", 4, "--out", tmp_path / "m", "--budget", 30)
    document = json.loads(run(*command, "--json").stdout)
    trials = {trial["method"]: trial for trial in document["trials"]}
    assert trials.keys() == {"zero-shot", "tip-adapter", "linear-probe"}
    chosen = [trial for trial in trials.values() if trial["chosen"]]
    assert [trial["method"] for trial in chosen] == [document["method"]]
    assert chosen[0]["accuracy"] == max(trial["accuracy"] for trial in trials.values())
    assert chosen[0]["hyperparameters"].items() <= document["hyperparameters"].items()

    result = run(*command)
    (row,) = [line.split() for line in result.stdout.splitlines() if line.lstrip().startswith("→")]
    assert row[1] == document["method"]
    assert f"{100 * chosen[0]['accuracy']:.1f}" in row
    assert "Chosen: " in result.stdout


def test_hyper_parameters_are_set_by_name(adapt):
    document = json.loads(adapt("--shots", 5, "--set", "alpha=2", "--set", "beta=3.5", "--json").stdout)
    assert document["hyperparameters"] == {"templates": "photo", "alpha": 2, "beta": 3.5}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--set", "gamma=2"], 1, "Unknown hyper-parameter 'gamma'"),
        (["--set", "alpha=-1"], 1, "must be at least 0"),
        (["--set", "alpha=much"], 1, "tip-adapter: alpha = much is not a number."),
        (["--set", "alpha"], 2, "NAME=VALUE"),
        (["--templates", "a photo"], 1, "lacks the {}"),
        (["--templates", "openai"], 1, "did you mean 'openai-80'"),
        (["--root", "somewhere"], 1, "is not a .json file"),
    ],
)
def test_wrong_options_are_refused(adapt, args, code, message):
    assert message in " ".join(adapt(*args, code=code).stderr.split())


def test_set_without_a_method_is_a_usage_error(run, photos):
    assert "--method KEY" in run("adapt", photos, "--set", "alpha=1", code=2).stderr


def test_values_take_the_type_of_the_default():
    assert parse_value("x", "val", "last") == "val"
    assert parse_value("x", "7", "last") == "7"
    assert parse_value("x", "2", 1.5) == 2
    assert parse_value("x", "true", False) is True
    assert parse_value("x", '["q", "v"]', ("q", "k")) == ["q", "v"]
    assert parse_value("x", "a photo of a", None) == "a photo of a"
    for text, default, wanted in [
        ("2.5", 1, "a whole number"),
        ("1", True, "true or false"),
        ("true", 1.0, "a number"),
    ]:
        with pytest.raises(ClipadaptError, match=wanted):
            parse_value("x", text, default)


def test_a_table_and_a_published_split_are_read_too(adapt, photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    table = tmp_path / "colours.csv"
    table.write_text("image,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    assert json.loads(adapt("--shots", 5, "--json", source=table).stdout)["held_out"]["images"] == 12

    names = sorted({file.parent.name for file in files})
    rows = [[f"{file.parent.name}/{file.name}", names.index(file.parent.name), file.parent.name] for file in files]
    split = tmp_path / "split_zhou_Colours.json"
    split.write_text(json.dumps({"train": rows[::2], "val": [], "test": rows[1::2]}))
    document = json.loads(adapt("--shots", 2, "--root", photos, "--json", source=split).stdout)
    assert (document["data"]["support"], document["held_out"]["images"]) == (8, 16)


def test_images_that_are_held_out_are_never_learned_from():
    data = Dataset(items=list(range(9000)), labels=[i % 3 for i in range(9000)], class_names=["a", "b", "c"])
    support, held_out = draw(data, None, shots=4, seed=1)
    assert support.items == data.few_shot(4, seed=1).items
    assert len(held_out) == MAX_HELD_OUT == len(set(held_out.items))
    assert not set(held_out.items) & set(support.items)
    assert draw(data, None, 4, 1)[1].items == held_out.items != draw(data, None, 4, 2)[1].items


def test_nothing_left_over_is_said(adapt):
    result = adapt("--shots", 8)
    assert "No images are left" in result.stdout
    assert json.loads(adapt("--shots", 8, "--json").stdout)["held_out"] is None


def test_small_classes_and_repeated_images_are_noted(adapt, photos, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(photos, odd)
    for extra in sorted((odd / "blue").iterdir())[2:]:
        extra.unlink()
    for file in sorted((odd / "red").iterdir()):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    noted = adapt("--shots", 5, source=odd).stderr
    assert "1 class with fewer than 5 images: blue (2)" in noted
    assert "with a copy among those learned from (identical files)" in noted


def test_one_class_is_refused(adapt, photos, tmp_path):
    shutil.copytree(photos / "red", tmp_path / "one" / "red")
    assert "at least two are needed" in adapt(source=tmp_path / "one", code=1).stderr


def test_unreadable_images_are_refused_or_skipped(adapt, photos, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(photos, damaged)
    broken = sorted((damaged / "red").iterdir())[0]
    broken.write_bytes(b"no image")
    assert f"{broken} is not an image" in adapt("--shots", 5, source=damaged, code=1).stderr
    document = json.loads(adapt("--shots", 5, "--on-error", "skip", "--json", source=damaged).stdout)
    assert [entry["image"] for entry in document["data"]["unreadable"]] == [str(broken)]
    assert document["data"]["support"] + document["held_out"]["images"] == 31


def test_only_models_are_replaced_and_that_is_known_before_the_work(adapt, photos, tmp_path, monkeypatch):
    adapt("--shots", 5)
    first = clipadapt.load(tmp_path / "model")
    adapt("--shots", 5, "--set", "beta=2")
    assert recipe(clipadapt.load(tmp_path / "model")) != recipe(first)

    monkeypatch.setattr("clipadapt.cli.adapt.read_photos", lambda *_: pytest.fail("the work began"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text('{"model_type": "clip"}')
    assert "holds other files and is not a clipadapt model" in adapt(out=tmp_path / "notes", code=1).stderr
    (tmp_path / "file").write_text("text")
    assert "is a file" in adapt(out=tmp_path / "file", code=1).stderr
    assert "is inside the image folder" in adapt(out=photos / "model", code=1).stderr


def test_the_model_finds_its_backbone_from_any_folder(run, photos, backbone, tmp_path, monkeypatch):
    shutil.copytree(backbone, tmp_path / "here" / "tiny")
    monkeypatch.chdir(tmp_path / "here")
    run("adapt", photos, "--backbone", "tiny", "--method", "tip-adapter", "--shots", 2)
    monkeypatch.chdir(tmp_path)
    assert clipadapt.load(tmp_path / "here" / "colours-adapted").class_names_ == ["blue", "green", "red", "yellow"]


def test_an_interrupted_training_goes_on_with_the_same_command(run, adapt, photos, backbone, tmp_path, monkeypatch):
    from clipadapt.training import loop

    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    settings = ("--set", "epochs=6", "--set", "n_ctx=2", "--set", "batch_size=8", "--shots", 4)
    whole = json.loads(adapt(*settings, "--json", method="coop", out=tmp_path / "whole").stdout)

    saving, steps = loop.save_progress, []

    def save(*args):
        saving(*args)
        steps.append(len(args[3]))
        if steps[-1] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_progress", save)
    result = adapt(*settings, method="coop", out=tmp_path / "model", code=130)
    assert "features and training so far are kept" in result.stderr
    assert not (tmp_path / "model").exists()
    resumed = adapt(*settings, "--json", method="coop", out=tmp_path / "model")
    assert "an interrupted training run is resumed" in resumed.stderr
    assert steps == [*range(1, 6), *range(6, 13)]  # 2 batches in each of 6 epochs, none of them twice
    assert json.loads(resumed.stdout)["held_out"] == whole["held_out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]
