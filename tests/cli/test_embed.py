"""From images to a folder of embeddings by the command line; it goes on where it was, and says what failed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clipadapt import load, load_backbone
from clipadapt.data import image_files
from clipadapt.embeddings import Embeddings
from clipadapt.features import encode_images


@pytest.fixture
def out(tmp_path):
    return tmp_path / "emb"


def test_a_folder_becomes_embeddings(run, photos, backbone, out):
    result = run("embed", photos, "--backbone", backbone, "--out", out)
    assert f"{out}: 32 images in 1 part of 1" in result.stdout
    found = Embeddings(out)
    expected = encode_images(load_backbone(backbone), image_files(photos), precision="float16", cache=False)
    np.testing.assert_array_equal(found.rows(range(32)), expected.features.numpy().astype(np.float16))
    assert found.table["folder"].to_pylist() == [name.split("/")[-2] for name in found.names]
    assert set(found.table["width"].to_pylist()) == {32}
    assert found.model is None

    document = json.loads(run("embed", photos, "--backbone", backbone, "--out", out, "--json").stdout)
    assert (document["made"], document["done_before"], document["images"]) == ([], 1, 0)


def test_parts_one_by_one_and_the_rest_at_once(run, photos, backbone, out):
    first = json.loads(run("embed", photos, "--backbone", backbone, "--out", out, "--shard", "1/3", "--json").stdout)
    assert (first["shards"], first["made"], first["images"]) == (3, [1], 11)
    rest = json.loads(run("embed", photos, "--backbone", backbone, "--out", out, "--json").stdout)
    assert (rest["shards"], rest["made"], rest["done_before"]) == (3, [0, 2], 1)
    assert len(Embeddings(out)) == 32


def test_a_shard_that_fails_is_named_and_made_the_next_time(run, photos, backbone, out, tmp_path):
    files = image_files(photos)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    (tmp_path / "list.txt").write_text("\n".join([*files[:4], str(bad), *files[4:8]]))
    command = ("embed", tmp_path / "list.txt", "--backbone", backbone, "--out", out, "--shards", 3)
    result = run(*command, "--json", code=1)
    document = json.loads(result.stdout)
    assert document["made"] == [0, 2]
    assert document["failed"] == {"1": f"{bad} is empty (0 bytes); an image file is needed."}
    assert "1 shard of 3 failed: 1; the same command makes only what is missing." in result.stderr
    document = json.loads(run(*command, "--on-error", "skip", "--json").stdout)
    assert (document["made"], document["images"], document["skipped"]) == ([1], 2, 1)
    assert Embeddings(out).names == files[:8]


def test_processes(run, photos, backbone, out, tmp_path):
    run("embed", photos, "--backbone", backbone, "--out", out, "--shards", 2, "--jobs", 2, "--batch-size", 8)
    run("embed", photos, "--backbone", backbone, "--out", tmp_path / "alone", "--shards", 2, "--batch-size", 8)
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


def test_as_an_adapted_model_encodes(run, photos, backbone, model, out, tmp_path):
    result = run("embed", photos, "--model", model, "--out", out)
    assert "embeddings made without --model serve it, too" in " ".join(result.stderr.split())
    found = Embeddings(out)
    assert found.model == str(model)
    assert found.image_fingerprint == load(model).encoder.image_fingerprint == load_backbone(backbone).image_fingerprint
    tuned = tmp_path / "tuned"
    settings = ("--set", "epochs=1", "--set", "lr=0.01")
    run("adapt", photos, "--backbone", backbone, "--method", "fine-tune", "--shots", 2, "--out", tuned, *settings)
    result = run("embed", photos, "--model", tuned, "--out", tmp_path / "tuned-emb")
    assert "without --model" not in result.stderr
    found = Embeddings(tmp_path / "tuned-emb")
    assert found.image_fingerprint == load(tuned).encoder.image_fingerprint != load_backbone(backbone).image_fingerprint
    expected = encode_images(load(tuned).encoder, image_files(photos), cache=False, precision="float16")
    np.testing.assert_array_equal(found.rows(range(32)), expected.features.numpy().astype(np.float16))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shard", "3/3"], 2, "'3/3' is not I/N"),
        (["--shard", "0"], 2, "'0' is not I/N"),
        (["--shard", "0/3", "--jobs", "2"], 2, "omit --shards, --jobs and --ray"),
        (["--model", "pets", "--backbone", "embedded"], 2, "omit --backbone"),
        (["--model", "no-model"], 1, "no-model is not a saved model"),
    ],
)
def test_wrong_arguments(run, photos, out, arguments, code, message):
    assert message in " ".join(
        run("embed", photos, "--out", out, *arguments, code=code).stderr.replace("│", "").split()
    )
    assert not out.exists()


def test_a_list_that_changed_is_refused(run, photos, backbone, out, tmp_path):
    files = image_files(photos)
    (tmp_path / "list.txt").write_text("\n".join(files))
    command = ("embed", tmp_path / "list.txt", "--backbone", backbone, "--out", out)
    run(*command)
    (tmp_path / "list.txt").write_text("\n".join(files[1:]))
    assert f"{out} was made of another list of images; use a new folder" in run(*command, code=1).stderr
