"""Named streams of a batch: stored features, several texts an item, negatives, groups; any objective; any family."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipadapt.backbones import load_backbone
from clipadapt.errors import BackboneError, ClipadaptError
from clipadapt.losses.contrastive import contrast, info_nce
from clipadapt.training.contrastive import adamw, train_contrastive
from clipadapt.training.pairs import Batches
from clipadapt.training.recipe import Recipe
from clipadapt.training.towers import Towers, backward
from tests.tiny import tiny_clip, tiny_siglip
from tests.training.test_contrastive import RECIPE, Squares, fresh, gradients, letters_tokenizer

PLAIN = replace(RECIPE, patch_dropout=0.0, unmasked_tuning=0.0)


class Streams:
    """The batches of `Squares`, changed by a function of the step."""

    def __init__(self, change):
        self.change = change

    def batch(self, step, batch_size, image_size, seed):
        pixels, texts = Squares().batch(step, batch_size, image_size, seed)
        return self.change(step, pixels, texts)


def batch_of(change, recipe: Recipe = PLAIN, **shares):
    return Batches(Streams(change), letters_tokenizer(), recipe, 16, 16, 16, **shares)[0].to(torch.device("cpu"))


def test_a_source_may_name_its_streams():
    plain = batch_of(lambda step, pixels, texts: (pixels, texts))
    named = batch_of(lambda step, pixels, texts: {"text": texts, "image": pixels})
    assert torch.equal(named.images["image"], plain.images["image"])
    assert torch.equal(named.ids["text"], plain.ids["text"])


def everything(step, pixels, texts):
    """Two texts and two wrong ones an item, groups and stored features."""
    return {
        "image": pixels,
        "text": [[text, text[::-1]] for text in texts],
        "negatives": [["z", "y x"]] * len(texts),
        "groups": torch.arange(len(texts)) // 2,
        "teacher": torch.eye(len(texts)),
    }


def test_outputs_of_every_stream():
    towers, batch = Towers(fresh()), batch_of(everything)
    out = towers(batch)
    assert {name: tuple(output.shape) for name, output in out.items()} == {
        "image": (8, 32), "text": (8, 2, 32), "negatives": (8, 2, 32), "groups": (8,), "teacher": (8, 8), "scale": (1,),
    }  # fmt: skip
    one = letters_tokenizer()(["z"], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(out["negatives"][3, 0], towers.encode_texts(one)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(out["teacher"], torch.eye(8))
    halves = [batch_of(everything, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.given["groups"] for half in halves]), batch.given["groups"])


def test_several_texts_are_the_mean_of_their_losses():
    out = Towers(fresh())(batch_of(everything))
    bare = {name: out[name] for name in ("image", "text", "scale")}
    losses = [info_nce(out["image"], out["text"][:, k], out["scale"]) for k in range(2)]
    assert contrast(bare).item() == pytest.approx((losses[0] + losses[1]).item() / 2, rel=1e-6)


def distil(out):
    """An objective of two terms, one of which uses a stream that no tower sees."""
    agreement = out["image"] @ out["image"].T
    return {"contrast": contrast(out), "teacher": (agreement - out["teacher"]).square().mean()}


@pytest.mark.parametrize("chunk", [3, 8])
def test_gradient_caching_is_exact_for_any_objective(chunk):
    """Groups and negatives reach across chunks; the teacher is a whole batch's."""
    towers, batch = Towers(fresh()), batch_of(everything)
    towers.zero_grad()
    whole = backward(towers, batch, None, distil)
    plain = torch.cat([p.grad.flatten() for p in towers.parameters()])
    towers.zero_grad()
    cached = backward(towers, batch, chunk, distil)
    gradient = torch.cat([p.grad.flatten() for p in towers.parameters()])
    for name in ("contrast", "teacher"):
        assert cached[name].item() == pytest.approx(whole[name].item(), rel=1e-5)
        assert not cached[name].requires_grad
    assert (gradient - plain).norm() <= 1e-5 * plain.norm()


def test_terms_of_the_objective_are_logged(tmp_path):
    train_contrastive(fresh(), Streams(everything), replace(PLAIN, steps=2), tmp_path, objective=distil)
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        if "loss" in line:
            assert line["loss"] == pytest.approx(sum(line["terms"].values()), rel=1e-6)
            assert set(line["terms"]) == {"contrast", "teacher"}


def test_stored_features_train_the_text_tower_as_pixels_do(tmp_path):
    """A locked image tower may be left out: its features are the same in every step."""
    recipe = replace(PLAIN, towers="text", steps=4)
    towers = Towers(fresh())

    def features(step, pixels, texts):
        batch = Batches(Streams(lambda *_: (pixels, texts)), letters_tokenizer(), recipe, 16, 16, 16)[step]
        with torch.no_grad():
            return {"image": towers(batch.to(torch.device("cpu")))["image"], "text": texts}

    start = fresh()
    seen = train_contrastive(fresh(), Squares(), recipe, tmp_path / "pixels")
    stored = train_contrastive(fresh(), Streams(features), recipe, tmp_path / "features")
    assert seen.image_fingerprint == stored.image_fingerprint == start.image_fingerprint
    for (name, ours), theirs in zip(stored.model.named_parameters(), seen.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        moved = not torch.equal(ours, start.model.get_parameter(name))
        assert moved == (not name.startswith("vis")), name
    with pytest.raises(ClipadaptError, match='set towers="text"'):
        train_contrastive(fresh(), Streams(features), PLAIN, tmp_path / "both")


def test_any_family_learns(tmp_path):
    """SigLIP with its own loss, which needs the bias; its texts are filled up, its image tower has no class token."""

    def sigmoid(out):
        logits = out["scale"] * out["image"] @ out["text"].T + out["bias"]
        return -torch.nn.functional.logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum(1).mean()

    backbone = load_backbone(tiny_siglip())
    source = Streams(lambda step, pixels, texts: (pixels, ["a red cat", "the blue house"] * 4))
    towers = Towers(backbone.copy())
    batch = Batches(source, backbone.tokenizer, PLAIN, 32, 16, backbone.context_length)[0].to(torch.device("cpu"))
    out = towers(batch)
    torch.testing.assert_close(out["text"][:2], backbone.encode_texts(["a red cat", "the blue house"]))
    torch.testing.assert_close(out["image"], backbone.encode_images(batch.images["image"]))
    assert out["bias"].item() == backbone.logit_bias
    trained = train_contrastive(backbone.copy(), source, PLAIN, tmp_path / "run", objective=sigmoid)
    assert load_backbone(tmp_path / "run" / "model").fingerprint == trained.fingerprint != backbone.fingerprint
    assert trained.logit_bias != backbone.logit_bias
    with pytest.raises(BackboneError, match="class token"):
        train_contrastive(backbone, source, RECIPE, tmp_path / "dropped")


def test_what_cannot_be_trained_is_named(tmp_path):
    backbone = load_backbone(tiny_clip())
    backbone.tokenizer = None
    with pytest.raises(BackboneError, match="lacks texts"):
        train_contrastive(backbone, Squares(), RECIPE, tmp_path)
    with pytest.raises(ClipadaptError, match="choice of towers 'image'"):
        Recipe(steps=1, batch_size=2, towers="image")
    ragged = Streams(lambda step, pixels, texts: (pixels, [["a"], ["b", "c"]] * 4))
    with pytest.raises(ClipadaptError, match="'text' needs equally many texts, not 1 to 2"):
        Batches(ragged, letters_tokenizer(), PLAIN, 16, 16, 16)[0]


def test_a_checkpoint_from_before_the_one_format_is_continued(tmp_path):
    """Then `train_contrastive` kept tensors by the names of parameters; the run goes on bit for bit."""
    whole = train_contrastive(fresh(), Squares(), RECIPE, tmp_path / "whole")

    class Stopped(Exception):
        pass

    class Stops(Squares):
        def batch(self, step, *arguments):
            if step == 4:
                raise Stopped
            return super().batch(step, *arguments)

    with pytest.raises(Stopped):
        train_contrastive(fresh(), Stops(), RECIPE, tmp_path / "old")
    file = tmp_path / "old" / "checkpoint.safetensors"
    kept, towers = load_file(file), Towers(fresh())
    names = {parameter: name for name, parameter in towers.named_parameters()}
    order = [names[p] for group in adamw(towers, RECIPE).param_groups for p in group["params"]]
    old = {}
    for i, name in enumerate(order):
        old[f"weight.{name}"], old[f"average.{name}"] = kept[f"kept.{i}"], kept[f"kept.{len(order) + i}"]
        old |= {f"{key}.{name}": kept[f"state.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    progress = {"step": 3, "seconds": 1.5, "ema_updates": 3}
    save_file(old, file, metadata={"progress": json.dumps(progress)})
    continued = train_contrastive(fresh(), Squares(), RECIPE, tmp_path / "old")
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(continued.model.state_dict()[key], tensor), key
    steps = [
        [(line["step"], line["loss"]) for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
        for log in (tmp_path / "old" / "log.jsonl", tmp_path / "whole" / "log.jsonl")
    ]
    assert steps[0] == steps[1]


def test_gradients_of_the_default_objective_are_those_of_info_nce():
    towers, batch = Towers(fresh()), batch_of(lambda step, pixels, texts: (pixels, texts))
    loss, gradient = gradients(towers, batch, None)
    towers.zero_grad()
    out = towers(batch)
    plain = info_nce(out["image"], out["text"], out["scale"])
    plain.backward()
    assert loss == plain.item()
    assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in towers.parameters()]))
