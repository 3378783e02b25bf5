"""Where support images come from: what stands for a source, what is retrieved, and how pipelines are called."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipadapt.backbones import load_backbone
from clipadapt.data import Dataset
from clipadapt.data.playground.drawing import Playground
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features import encode_classes, encode_images
from clipadapt.sources.images import Drawn, Generated, Given, Retrieved, as_image_source, support_of
from tests.images import colours
from tests.tiny import tiny_clip

NAMES = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def pixels(data: Dataset) -> list[bytes]:
    return [item.open().tobytes() for item in data.items]


def by_class(data: Dataset) -> dict[str, list[bytes]]:
    return {name: pixels(data.only([name])) for name in data.class_names}


# -- what stands for a source -----------------------------------------------------------------------------------------


def test_image_source(backbone, tmp_path):
    data = colours(2, seed=1)
    assert as_image_source(data, backbone)(NAMES, 99, 1) is data
    for item, label in zip(data.items, data.labels, strict=True):
        folder = tmp_path / "photos" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        item.open().save(folder / f"{len(list(folder.iterdir()))}.png")
    for path in (tmp_path / "photos", str(tmp_path / "photos")):
        found = as_image_source(path, backbone)(NAMES, 1, 1)
        assert (found.name, found.counts) == ("photos", [2, 2, 2, 2])
    assert as_image_source("playground", backbone) == Drawn(32)
    for source in (Given(data), Drawn(48), Retrieved(data, backbone=backbone), Generated("some/model"), len):
        assert as_image_source(source, backbone) is source
    assert as_image_source(Retrieved(data), backbone).backbone is backbone


def test_image_source_refuses_everything_else(backbone):
    with pytest.raises(DataError, match="nowhere does not exist; a folder with one sub-folder per class is needed"):
        as_image_source("nowhere", backbone)
    for wrong in (3, None, [Image.new("RGB", (8, 8))], Retrieved):
        with pytest.raises(ClipadaptError, match=r'a Dataset, a folder of classes, "playground", or a callable .* not'):
            as_image_source(wrong, backbone)
    with pytest.raises(ClipadaptError, match="must return a Dataset, not list"):
        support_of(lambda *_: [], backbone, NAMES, 1, 1)


def test_support_of_labels_in_the_order_of_the_names(backbone):
    data = colours(2, seed=1)
    support = support_of(data, backbone, ["blue", "red"], 99, 1)
    assert support.class_names == ["blue", "red"]
    assert pixels(support.only(["red"])) == pixels(data.only(["red"]))
    with pytest.raises(ClipadaptError, match=f"source {data.name} has no image of 'teal'; it has images of 'blue', "):
        support_of(data, backbone, ["blue", "teal"], 99, 1)
    empty = dataclasses.replace(data.select(range(6)), name="six")  # none of yellow, which it knows by name
    with pytest.raises(ClipadaptError, match="source six has no image of 'yellow'"):
        support_of(empty, backbone, NAMES, 99, 1)


def test_playground(backbone):
    source = as_image_source("playground", backbone)
    drawn = source(["star", "house"], 3, 1)
    assert drawn.counts == [3, 3]
    assert drawn.items[0].open().size == (32, 32)
    assert by_class(drawn) == by_class(source(["house", "star"], 3, 1))
    assert set(pixels(drawn)).isdisjoint(pixels(source(["star", "house"], 3, 2)))
    theirs = Playground(size=32, kinds=("house", "star"), seed=1).dataset(3)
    assert set(pixels(drawn)).isdisjoint(pixels(theirs)), "never the images of somebody's data set"
    with pytest.raises(ClipadaptError, match=r"the playground cannot draw 'red', 'dog'; it draws .*star"):
        source(["star", "red", "dog"], 3, 1)


# -- retrieved --------------------------------------------------------------------------------------------------------


def test_retrieved_are_the_most_similar(backbone, tmp_path):
    pool = colours(4, seed=3)
    source = Retrieved(pool.items + pool.items[:5], backbone=backbone)  # with copies
    found = source(["red", "dog"], 3, 1)
    assert (found.labels, found.class_names) == ([0, 0, 0, 1, 1, 1], ["red", "dog"])
    features, texts = encode_images(backbone, pool).features, encode_classes(backbone, ["red", "dog"])
    nearest = (texts @ features.T).numpy().argsort(axis=1)[:, ::-1][:, :3]
    assert pixels(found) == [pool.items[i].open().tobytes() for i in nearest.flatten()]
    # whatever the order of the classes and of the pool, and from a folder of loose images
    other = Retrieved(pool.items[::-1], backbone=backbone)(["dog", "red"], 3, 2)
    assert by_class(other) == by_class(found)
    for i, item in enumerate(pool.items):
        item.open().save(tmp_path / f"{i}.png")
    assert pixels(Retrieved(tmp_path, backbone=backbone)(["red", "dog"], 3, 1)) == pixels(found)


def test_retrieved_by_other_sentences(backbone):
    pool = colours(4, seed=3)
    plain = Retrieved(pool, ["a small {}", "a large {}"], backbone=backbone)(["cat", "star"], 2, 1)
    prompts = {name: [f"a small {name}", f"a large {name}"] for name in ("cat", "star")}
    assert pixels(Retrieved(pool, backbone=backbone)(["cat", "star"], 2, 1, prompts)) == pixels(plain)


def test_retrieved_refuses_a_small_pool(backbone):
    with pytest.raises(DataError, match="'mine' holds 4 different images; 5 per class"):
        Retrieved(colours(1, seed=3).items * 2, name="mine", backbone=backbone)(NAMES, 5, 1)
    with pytest.raises(DataError, match="'retrieved' holds 0 different images"):
        Retrieved([], backbone=backbone)(NAMES, 1, 1)
    with pytest.raises(ClipadaptError, match="Retrieved compares features and needs backbone="):
        Retrieved(colours(1, seed=3))(NAMES, 1, 1)


# -- generated --------------------------------------------------------------------------------------------------------


class Painter:
    """Called as a diffusers pipeline is: noise that depends on sentence and generator; keeps the calls."""

    name_or_path = "painter"

    def __init__(self, blackened: str = "") -> None:
        self.calls: list[tuple[list[str], dict[str, Any]]] = []
        self.blackened = blackened

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **settings: Any) -> SimpleNamespace:
        self.calls.append((prompt, settings))
        drawn = [torch.randint(len(p), 256, (8, 8, 3), generator=g) for p, g in zip(prompt, generator, strict=True)]
        images = [Image.fromarray(values.numpy().astype(np.uint8)) for values in drawn]
        bad = [bool(self.blackened) and self.blackened in p for p in prompt]
        return SimpleNamespace(images=images, nsfw_content_detected=bad)


def test_generated_by_the_call_protocol(backbone):
    painter = Painter()
    source = Generated(painter, templates=["a {}", "the big {}"], settings={"guidance_scale": 7.5}, batch_size=4)
    made = source(["red", "blue"], 3, 1)
    sentences = [f"{words} {name}" for name in ("red", "blue") for words in ("a", "the big", "a")]
    assert made.paths == sentences, "an image is named by its sentence"
    assert made.labels == [0, 0, 0, 1, 1, 1]
    assert len(set(pixels(made))) == 6
    settings = {"guidance_scale": 7.5}
    assert painter.calls == [(sentences[:4], settings), (sentences[4:], settings)]
    # nothing is made twice, and more images add to those
    assert pixels(source(["red", "blue"], 3, 1)) == pixels(made)
    assert len(painter.calls) == 2
    more = source(["blue", "red"], 4, 1)
    assert len(painter.calls) == 3
    assert pixels(more.only(["red"]))[:3] == pixels(made)[:3]
    # the same in another process, whatever the batches; other seeds and sentences give other images
    again = Generated(Painter(), templates=["a {}", "the big {}"], settings=settings, batch_size=1)
    assert by_class(again(["blue", "red"], 3, 1)) == by_class(made)
    assert set(pixels(again(["red", "blue"], 3, 2))).isdisjoint(pixels(made))
    prompts = {"red": ["a red one"], "blue": ["one", "two"]}
    told = again(["red", "blue"], 3, 1, prompts)
    assert told.paths == ["a red one"] * 3 + ["one", "two", "one"]


def test_generated_defaults_are_those_of_sus_x(backbone):
    painter = Painter()
    Generated(painter)(["red_hot"], 6, 1)
    settings = {"guidance_scale": 9.5, "num_inference_steps": 85}
    assert painter.calls == [(["a photo of a red hot."] * 5, settings), (["a photo of a red hot."], settings)]


def test_generated_into_a_folder_goes_on_where_it_was(backbone, tmp_path):
    painter = Painter()
    made = Generated(painter, folder=tmp_path)(["red", "A/C unit"], 2, 1)
    assert made.paths == ["a photo of a red."] * 2 + ["a photo of a A/C unit."] * 2
    files = sorted(path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.png"))
    assert files == ["A_C unit", "A_C unit", "red", "red"]
    before = pixels(made)
    next(iter((tmp_path / "red").iterdir())).unlink()
    again = Generated(other := Painter(), folder=tmp_path)(["red", "A/C unit"], 2, 1)
    assert [len(prompts) for prompts, _ in other.calls] == [1]
    assert pixels(again) == before


def test_blackened_images_are_left_out(backbone):
    painter = Painter(blackened="the big red")
    source = Generated(painter, templates=["a {}", "the big {}"])
    made = source(["red", "blue"], 2, 1)
    assert made.paths == ["a red", "a blue", "the big blue"]
    assert source(["red", "blue"], 2, 1).counts == [1, 2]
    assert len(painter.calls) == 1
    with pytest.raises(ClipadaptError, match="source generated has no image of 'red'"):
        support_of(Generated(Painter(blackened="red")), backbone, ["red", "blue"], 2, 1)


def test_generated_refusals(backbone, tmp_path, monkeypatch):
    with pytest.raises(
        ClipadaptError, match="pipeline must be a diffusers pipeline, or the folder or hub id of one, not 3"
    ):
        Generated(3)
    with pytest.raises(ClipadaptError, match="batch_size must be at least 1, not 0"):
        Generated(Painter(), batch_size=0)
    silent = Generated(lambda prompt, **_: SimpleNamespace(images=[]))
    with pytest.raises(ClipadaptError, match="must return `images`, one PIL image for each sentence"):
        silent(NAMES, 1, 1)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ClipadaptError, match=r"some/model needs diffusers; .*pip install 'clipadapt\[diffusers\]'"):
        Generated("some/model")(NAMES, 1, 1)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    """Folder of a tiny random Stable Diffusion that draws 16 x 16 images."""
    diffusers = pytest.importorskip("diffusers")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_clip())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae, unet=unet, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer,
            scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    folder = tmp_path_factory.mktemp("diffusion")
    pipeline.save_pretrained(folder)
    return folder


def test_a_pipeline_of_diffusers(diffusion, backbone, tmp_path):
    """From its folder; a scheduler that draws noise at each step does not matter."""
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    source = Generated(diffusion, settings=settings, batch_size=3)
    assert source.name == str(diffusion)
    torch.manual_seed(5)  # global state must not matter
    made = source(["red", "blue"], 2, 1)
    assert made.counts == [2, 2]
    assert [item.open().size for item in made.items] == [(16, 16)] * 4
    assert len(set(pixels(made))) == 4
    again = Generated(diffusion, settings=settings, batch_size=4)(["blue", "red"], 2, 1)
    for name in ("red", "blue"):
        for ours, theirs in zip(made.only([name]).items, again.only([name]).items, strict=True):
            assert np.abs(np.asarray(ours.open(), int) - np.asarray(theirs.open(), int)).max() <= 1
    import diffusers

    loaded = diffusers.DiffusionPipeline.from_pretrained(diffusion)
    loaded.set_progress_bar_config(disable=True)
    given = Generated(loaded, settings=settings, batch_size=3)(["red", "blue"], 2, 1)
    assert pixels(given) == pixels(made)


def test_what_is_no_pipeline(backbone, tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(ClipadaptError, match="diffusers cannot load a text-to-image pipeline from"):
        Generated(tmp_path)(NAMES, 1, 1)
