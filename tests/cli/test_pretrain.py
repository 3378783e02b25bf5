"""`clipadapt pretrain run` on a handful of images: it trains, can be continued, and ends in a plain folder."""

import json

import numpy as np
import pytest
from transformers import CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from clipadapt.cli.pretrain import app
from clipadapt.errors import ClipadaptError

COLOURS = {
    "red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "yellow": (250, 220, 0),
    "black": (0, 0, 0), "pink": (255, 150, 190), "brown": (130, 70, 20), "grey": (128, 128, 128),
}  # fmt: skip
RECIPE = {"preset": "tiny", "vocabulary": 560, "steps": 2, "batch_size": 4, "precision": "fp32", "log_every": 1,
          "workers": 0}  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    """One plain image a colour, as `clipadapt pretrain corpus` keeps them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    images = np.full((len(COLOURS), 64, 64, 4), 255, np.uint8)
    with open(folder / "pairs.jsonl", "w") as file:
        for index, (name, colour) in enumerate(COLOURS.items()):
            images[index, ..., :3] = colour
            pair = {"source": "noto", "name": name, "texts": [name], "keywords": [], "other": [], "split": "train"}
            file.write(json.dumps(pair | {"kind": "emoji"}) + "\n")
    np.save(folder / "images.npy", images)
    (folder / "corpus.json").write_text("{}")
    return folder


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr("clipadapt.evaluation.studies.pretraining.corpus_hooks", lambda *_: {})


def pretrain(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.usefixtures("no_evaluation")
def test_run_trains_and_continues(corpus, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    out = tmp_path / "run"
    result = pretrain("run", corpus, "--out", out, "--recipe", recipe)
    assert result.exit_code == 0
    assert f"The model is in {out / 'model'}" in result.output

    assert pretrain("run", corpus, "--out", out, "--recipe", recipe, "--steps", 3).exit_code == 0
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    model, tokenizer = CLIPModel.from_pretrained(out / "model"), CLIPTokenizer.from_pretrained(out / "model")
    features = model.get_text_features(**tokenizer(["a photo of a red."], return_tensors="pt")).pooler_output
    assert features.isfinite().all()
    assert model.config.text_config.vocab_size == len(tokenizer)


@pytest.mark.usefixtures("no_evaluation")
def test_bad_recipes_are_named(corpus, tmp_path):
    recipe = tmp_path / "recipe.json"
    with pytest.raises(ClipadaptError, match="cannot be read: No such file"):
        pretrain("run", corpus, "--out", tmp_path / "run", "--recipe", recipe)
    recipe.write_text("{steps: 2}")
    with pytest.raises(ClipadaptError, match=r"recipe\.json is not JSON"):
        pretrain("run", corpus, "--out", tmp_path / "run", "--recipe", recipe)
    recipe.write_text(json.dumps(RECIPE | {"batchsize": 8}))
    with pytest.raises(ClipadaptError, match="did you mean 'batch_size'"):
        pretrain("run", corpus, "--out", tmp_path / "run", "--recipe", recipe)
