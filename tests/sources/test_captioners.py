"""Captions by tiny random image-to-text models, as plain transformers would give them, and by a backbone alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import ImageItem
from clipadapt.errors import BackboneError, ClipadaptError
from clipadapt.sources.captioners import OPEN, PHRASES, ImageToText, Phrases, as_captioner, describe
from tests.tiny import _word_tokenizer, tiny_clip

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"height": 32, "width": 32}, "do_center_crop": False}


def save(model: torch.nn.Module, tokenizer, folder: Path) -> Path:
    for name, parameter in model.named_parameters():  # larger than usual, so that images differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def blip(folder: Path) -> Path:
    tokenizer = _word_tokenizer(
        pad="[PAD]", start="[CLS]", end="[SEP]", unknown="[UNK]", specials=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    )
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**SMALL, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_dim": 8}
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 8}
    config = transformers.BlipConfig(text_config={**text, "encoder_hidden_size": 16}, vision_config=vision)
    return save(transformers.BlipForConditionalGeneration(config), tokenizer, folder)


def encoder_decoder(folder: Path) -> Path:
    tokenizer = _word_tokenizer(
        pad="<pad>", start="<s>", end="</s>", unknown="<unk>", specials=["<s>", "<pad>", "</s>", "<unk>"]
    )
    encoder = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    decoder = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True,
        is_decoder=True, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    model = transformers.VisionEncoderDecoderModel(config=config)
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=0, pad_token_id=1, eos_token_id=2)
    return save(model, tokenizer, folder)


@pytest.fixture(scope="module", params=[blip, encoder_decoder], ids=["blip", "encoder-decoder"])
def folder(request, tmp_path_factory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)) for _ in range(5)]


def test_captions_are_the_models_own_whatever_the_batches(folder, images):
    one_by_one = ImageToText(folder, max_new_tokens=6, batch_size=1)(images)
    assert len(one_by_one) == 5
    assert all(sentence == sentence.strip() and "<" not in sentence and "[" not in sentence for sentence in one_by_one)
    assert len(set(one_by_one)) > 1, "they tell of the image"
    torch.manual_seed(7)  # global state must not matter
    assert ImageToText(folder, max_new_tokens=6, batch_size=3)(images) == one_by_one
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    ids = model.generate(pixel_values=pixels, max_new_tokens=6, num_beams=3, do_sample=False)
    plain = transformers.AutoTokenizer.from_pretrained(folder).batch_decode(ids, skip_special_tokens=True)
    assert [sentence.strip() for sentence in plain] == one_by_one


def test_grey_and_transparent_images_and_none(folder, images):
    caption = ImageToText(folder, max_new_tokens=4)
    assert caption([]) == []
    assert caption([images[0].convert("L")]) == caption([images[0].convert("L").convert("RGB")])
    assert len(caption([images[0].convert("RGBA")])) == 1


def test_describe(folder, images):
    items = [ImageItem(f"image {i}", image) for i, image in enumerate(images)]
    assert describe(ImageToText(folder), items) == ImageToText(folder)(images)
    counts: list[int] = []

    def size(images: list[Image.Image]) -> list[str]:
        counts.append(len(images))
        return [f"{image.width} pixels" for image in images]

    assert describe(size, items * 20) == ["30 pixels"] * 100
    assert counts == [OPEN, 100 - OPEN], "few are open at a time"
    assert describe(size, []) == []
    for wrong in (lambda images: "a" * len(images), lambda images: ["a"], lambda images: [1] * len(images)):
        with pytest.raises(ClipadaptError, match="one string per image, a list of 5"):
            describe(wrong, items)


def test_phrases_are_the_most_similar_ones(images):
    clip = load_backbone(tiny_clip())
    phrases = ["a red cat", "a large house", "a small star"]
    said = Phrases(clip, phrases)(images)
    with torch.no_grad():
        texts = clip.encode_texts(phrases)
        for image, sentence in zip(images, said, strict=True):
            assert sentence == phrases[int((texts @ clip.encode_images(clip.preprocess(image)[None])[0]).argmax())]
    assert Phrases(clip)([]) == []
    assert set(describe(Phrases(clip), [ImageItem("one", image) for image in images])) <= set(PHRASES)


def test_where_captioners_come_from(folder, monkeypatch):
    clip = load_backbone(tiny_clip())
    assert isinstance(as_captioner("phrases", clip), Phrases)
    for path in (folder, str(folder)):
        found = as_captioner(path, clip)
        assert (type(found), found.name, found.device) == (ImageToText, str(folder), clip.device)
    assert as_captioner(len, clip) is len
    for wrong in (3, None, ImageToText):
        with pytest.raises(ClipadaptError, match=r'captioner is "phrases", a hub id or folder, or a callable .* not'):
            as_captioner(wrong, clip)
    monkeypatch.setattr(Backbone, "capabilities", property(lambda self: frozenset()))
    with pytest.raises(BackboneError, match="Phrases needs texts"):
        as_captioner("phrases", clip)


def test_refused(tmp_path, images):
    with pytest.raises(ClipadaptError, match="must be at least 1"):
        ImageToText("some/model", num_beams=0)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    lazy = ImageToText(tmp_path)  # not read until an image comes
    with pytest.raises(BackboneError, match="cannot be loaded as a captioner"):
        lazy(images)
