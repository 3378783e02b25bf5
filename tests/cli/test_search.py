"""`index`, `search`, `dedup` and `clusters` at the terminal: tables, JSON, pages, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import clipadapt
from clipadapt.data import image_files
from clipadapt.embeddings import Embeddings, encode_shard
from clipadapt.search import Index, query_vector


@pytest.fixture(scope="module")
def files(photos, tmp_path_factory):
    """The images of `photos`, a copy of one, and one with an unusual name."""
    folder = tmp_path_factory.mktemp("search") / "photos"
    shutil.copytree(photos, folder)
    shutil.copy(folder / "red" / "0.png", folder / "copy of [bold]red.png")
    return image_files(folder)


@pytest.fixture(scope="module")
def emb(files, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "emb"
    years = {"year": list(range(2000, 2000 + len(files)))}
    encode_shard(clipadapt.load_backbone(backbone), files, folder, columns=years)
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def test_json_is_what_python_finds(run, emb, backbone, files):
    document = json.loads(
        run("search", emb, "red", "cat", "--image", files[3], "--minus", "dog", "--top", 4, "--json",
            *("--weight", 2, "--weight", 1, "--weight", 0.5, "--weight", 0.25)).stdout
    )  # fmt: skip
    vector = query_vector(clipadapt.load_backbone(backbone), [("red", 2), "cat"], [(files[3], 0.5)], [("dog", 0.25)])
    (hits,) = Index.open(emb).search(vector[None], 4)
    assert document["hits"] == [vars(hit) for hit in hits]
    assert (document["images"], document["store"], document["where"]) == (33, "exact", None)
    assert set(document["hits"][0]) == {"rank", "score", "id", "name", "facts"}


def test_the_table(run, emb, files):
    copy = next(name for name in files if "copy of" in name)
    shown = run("search", emb, "--image", copy, "--top", 2, "--where", "year > 2001").stdout
    assert "copy of [bold]red.png" in shown
    assert f"year {2000 + files.index(copy)}" in shown
    assert "1.000" in shown
    assert (
        run("search", emb, "red", "--where", "year > 3000").stdout
        == "nothing found among 33 images where year > 3000\n"
    )


def test_the_page(run, emb, tmp_path):
    page = tmp_path / "found.html"
    result = run("search", emb, "<red>", "--top", 3, "--html", page)
    assert result.stdout == ""
    text = page.read_text()
    assert text.count("<img ") == 3
    assert "<h1>&lt;red&gt;</h1>" in text


def test_adapted_models(run, emb, model, photos, backbone, files, tmp_path):
    found = run("search", emb, "--class", "red", "--model", model, "--top", 9, "--json")
    assert "need not be embedded again" in found.stderr
    names = [Path(hit["name"]) for hit in json.loads(found.stdout)["hits"]]
    probabilities = clipadapt.load(model).predict_proba(names)[:, clipadapt.load(model).class_names_.index("red")]
    scores = [hit["score"] for hit in json.loads(found.stdout)["hits"]]
    assert scores == pytest.approx(probabilities.tolist(), abs=1e-2)  # which rounds to float16
    assert {name.parent.name for name in names[:5]} <= {"red", "photos"}
    assert "%" in run("search", emb, "--class", "red", "--model", model).stdout

    lora = tmp_path / "lora"
    run("adapt", photos, "--backbone", backbone, "--method", "clip-lora", "--set", "steps_per_shot=1",
        "--shots", 2, "--out", lora)  # fmt: skip
    refused = run("search", emb, "red", "--model", lora, code=1).stderr
    assert "clipadapt embed PHOTOS --model" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a TEXT"),
        (["red", "--class", "red"], "cannot be combined"),
        (["red", "--weight", "1", "--weight", "2"], "1, not 2"),
        (["red", "--weight", "-1"], "weights must be positive"),
    ],
)
def test_command_lines_that_make_no_sense(run, emb, arguments, message):
    assert message in " ".join(run("search", emb, *arguments, code=2).stderr.replace("│", " ").split())


def test_what_cannot_be_searched(run, emb, tmp_path):
    assert "`clipadapt embed` makes them" in run("search", tmp_path, "red", code=1).stderr
    assert "is a backbone" in run("search", emb, "--class", "red", code=1).stderr
    assert "'yeer'; did you mean 'year'" in run("search", emb, "red", "--where", "yeer = 1", code=1).stderr
    assert "is not a saved model" in run("search", emb, "red", "--model", tmp_path, code=1).stderr


def test_index(run, emb, tmp_path):
    folder = shutil.copytree(emb, tmp_path / "emb")
    exact = json.loads(run("search", folder, "red", "--json").stdout)
    assert "33 images indexed in" in run("index", folder, "--store", "lance").stdout
    assert "33 images indexed already" in run("index", folder, "--store", "lance").stdout
    found = json.loads(run("search", folder, "red", "--json").stdout)
    assert found["store"] == "lance"
    assert [hit["id"] for hit in found["hits"]] == [hit["id"] for hit in exact["hits"]]
    assert "'lanse'; did you mean 'lance'" in run("index", folder, "--store", "lanse", code=1).stderr
    assert "searched exactly" in run("index", folder, "--store", "exact").stdout


def test_dedup(run, emb, files, tmp_path):
    document = json.loads(run("dedup", emb, "--threshold", 1, "--json").stdout)
    copy, original = (next(name for name in files if part in name) for part in ("copy of", "red/0.png"))
    (group,) = [group for group in document["groups"] if group["copies"][0]["same_content"]]
    assert (group["keep"][0]["name"], group["copies"][0]["name"]) == (copy, original)
    assert original in run("dedup", emb, "--threshold", 1, "--list").stdout.splitlines()
    shown = run("dedup", emb, "--threshold", 1).stdout
    assert "same content" in shown
    assert "[bold]red.png" in shown
    assert run("dedup", emb, "--threshold", 1, "--html", tmp_path / "d.html").stdout == ""
    assert (tmp_path / "d.html").read_text().count('class="marked"') >= 1
    assert Path(original).is_file()
    assert "a cosine in (0, 1]" in run("dedup", emb, "--threshold", 2, code=1).stderr


def test_names_with_line_breaks_are_not_listed(run, backbone, photos, tmp_path):
    source = next((photos / "red").iterdir())
    paths = [str(shutil.copy(source, tmp_path / name)) for name in ("a.png", "b\n.png")]
    encode_shard(clipadapt.load_backbone(backbone), paths, tmp_path / "emb")
    result = run("dedup", tmp_path / "emb", "--list")
    assert result.stdout == ""
    assert "has a line break" in result.stderr


def test_clusters(run, emb, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("red\nblue\n")
    document = json.loads(run("clusters", emb, "--k", 3, "--names", words, "--json").stdout)
    assert sorted(name for group in document["clusters"] for name in group["images"]) == sorted(Embeddings(emb).names)
    assert all(set(group["words"]) == {"red", "blue"} for group in document["clusters"])
    assert json.loads(run("clusters", emb, "--k", 3, "--names", words, "--json").stdout) == document
    assert "nearest to its centre" in run("clusters", emb).stdout
    run("clusters", emb, "--html", tmp_path / "c.html")
    assert (tmp_path / "c.html").read_text().count("<h2>") == 4
