"""Detectors answer in one form, whatever they are: models of transformers, the backbone's own patches, a callable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data.playground.drawing import TRAIN_KINDS, TRAIN_STYLES, Playground
from clipadapt.errors import BackboneError, ClipadaptError
from clipadapt.sources.detectors import Saliency, ZeroShotDetector, as_detector, components, detect
from tests.tiny import tiny

NAMES = ["cat", "red dog", "star"]


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """60 x 40, a red square on grey."""
    out = Image.new("RGB", (60, 40), (120, 120, 120))
    ImageDraw.Draw(out).rectangle((30, 10, 44, 24), fill=(220, 30, 30))
    return out


# -- models of transformers -------------------------------------------------------------------------------------------

_TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TEXT, "hidden_size": 32, "image_size": 32, "patch_size": 8}


def _save(folder: Path, model: Any, tokenizer: Any, processor: dict[str, Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _owl(folder: Path, kind: str) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("clip"))
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config, model = {
        "OwlViT": (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection),
        "Owlv2": (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection),
    }[kind]
    processor = {"image_processor_type": f"{kind}ImageProcessor", "size": {"height": 32, "width": 32}}
    return _save(
        folder, model(config(text_config=text, vision_config=_VISION, projection_dim=24)), tokenizer, processor
    )


@pytest.fixture(scope="session")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _owl(tmp_path_factory.mktemp("owl"), "OwlViT")


@pytest.fixture(scope="session")
def owl2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _owl(tmp_path_factory.mktemp("owl2"), "Owlv2")


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("chinese_clip"))
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(**_TEXT, vocab_size=len(tokenizer)),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=7, max_text_len=32,
    )  # fmt: skip
    processor = {
        "image_processor_type": "GroundingDinoImageProcessor",
        "size": {"shortest_edge": 96, "longest_edge": 160},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GroundingDinoForObjectDetection(config)
    model.save_pretrained(folder := tmp_path_factory.mktemp("dino"))
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("kind", ["owl", "owl2"])
def test_owl_as_transformers_reads_it(kind, image, request):
    """Per box the best name and its score are those of transformers' own post-processing."""
    folder = request.getfixturevalue(kind)
    found = ZeroShotDetector(folder)(image, NAMES)
    assert (found.scores.diff() <= 0).all()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    texts = tokenizer([f"a photo of a {n}" for n in NAMES], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = model(**processor(image, return_tensors="pt"), **texts)
    expected = processor.post_process_object_detection(out, threshold=0.0, target_sizes=[(40, 60)])[0]
    cut = expected["boxes"].clamp(min=0).minimum(torch.tensor([60, 40, 60, 40]))
    inside = (cut[:, 2:] > cut[:, :2]).all(1)  # OWLv2 also looks at the padding below the image
    assert len(found.boxes) == 3 * int(inside.sum()), "each box with each name"
    expected, cut = {key: value[inside] for key, value in expected.items()}, cut[inside]
    order = expected["scores"].argsort(descending=True)
    seen, rows = set(), []
    for i, box in enumerate(found.boxes.tolist()):  # the first of each box is its best name
        if tuple(box) not in seen:
            seen.add(tuple(box))
            rows.append(i)
    torch.testing.assert_close(found.scores[rows], expected["scores"][order], atol=1e-6, rtol=0)
    assert torch.equal(found.names[rows], expected["labels"][order])
    torch.testing.assert_close(found.boxes[rows], cut[order], atol=1e-3, rtol=0)


def test_grounding_dino_scores_each_name_by_its_own_words(dino, image):
    detector = ZeroShotDetector(dino)
    found = detector(image, NAMES)
    assert sorted(set(found.names.tolist())) == [0, 1, 2]
    processor = transformers.AutoImageProcessor.from_pretrained(dino, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(dino)
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(dino).eval()
    text = tokenizer("cat. red dog. star.", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(text["input_ids"][0]) == (
        ["[CLS]", "cat", ".", "red", "dog", ".", "star", ".", "[SEP]"]
    )
    with torch.no_grad():
        out = model(**processor(image, return_tensors="pt"), **text)
    scores = out.logits[0].sigmoid()
    expected = torch.stack([scores[:, 1], scores[:, 3:5].amax(1), scores[:, 6]], 1)  # (7, 3)
    for name in range(3):
        best = expected[:, name].argmax()
        x, y, w, h = out.pred_boxes[0, best].tolist()
        cut = [max((x - w / 2) * 60, 0), max((y - h / 2) * 40, 0), min((x + w / 2) * 60, 60), min((y + h / 2) * 40, 40)]
        np.testing.assert_allclose(found.of(name), cut, atol=1e-3)
        np.testing.assert_allclose(found.scores[found.names == name].max(), expected[best, name], atol=1e-6)
    with pytest.raises(ClipadaptError, match="at most 32 tokens"):
        detector(image, NAMES * 10)
    with pytest.raises(ClipadaptError, match="blank name"):
        detector(image, ["cat", "."])


def test_threshold_names_and_repetition(owl, image):
    everything = ZeroShotDetector(owl)(image, NAMES)
    middle = float(everything.scores.median())
    some = ZeroShotDetector(owl, threshold=middle)(image, NAMES)
    assert 0 < len(some.scores) < len(everything.scores)
    assert (some.scores >= middle).all()
    assert len(ZeroShotDetector(owl)(image, []).boxes) == 0
    again = ZeroShotDetector(owl)(image, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(again, everything, strict=True))
    turned = ZeroShotDetector(owl)(image, NAMES[::-1])
    for i in range(3):
        torch.testing.assert_close(turned.of(2 - i), everything.of(i), atol=1e-3, rtol=0)


def test_loaded_when_called_and_not_before(owl, image, tmp_path):
    for source, reason in ((tmp_path / "none", "cannot be loaded"), (tiny("clip"), "type 'clip'")):
        detector = ZeroShotDetector(source)
        with pytest.raises(BackboneError, match=reason):
            detector(image, NAMES)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in owl.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights.pop("box_head.dense0.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks weights.*box_head\.dense0\.weight"):
        ZeroShotDetector(broken)(image, NAMES)


# -- the caller's own -------------------------------------------------------------------------------------------------


def test_answers_are_checked_cut_and_ordered(image):
    def lists(image, names):
        return [[-5, 2, 10, 12], [50, 30, 99, 99], [70, 5, 80, 9]], [0.2, 0.9, 1.0], [1, 0, 0]

    found = detect(lists, image, NAMES)
    assert found.boxes.tolist() == [[50, 30, 60, 40], [0, 2, 10, 12]], "the third lies outside"
    assert found.names.tolist() == [0, 1]
    assert found.of(2) is None
    for nothing in (([], [], []), (np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)), (torch.zeros(0, 4), [], [])):
        assert len(detect(lambda *_, nothing=nothing: nothing, image, NAMES).boxes) == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (([[0, 0, 1, 1]], [1.0]), "three arrays"),
        (([[0, 0, 1]], [1.0], [0]), "boxes"),
        (([[0, 0, 1, 1]], [1.0, 2.0], [0]), "boxes"),
        (([[0, 0, 1, float("nan")]], [1.0], [0]), "finite"),
        (([[0, 0, 1, 1]], [1.0], [3]), "from 0 to 2"),
        (([[0, 0, 1, 1]], [1.0], ["cat"]), "three arrays|from 0"),
        (None, "three arrays"),
    ],
)
def test_bad_answers_are_refused(image, answer, reason):
    with pytest.raises(ClipadaptError, match=reason):
        detect(lambda *_: answer, image, NAMES)


# -- the backbone itself ----------------------------------------------------------------------------------------------


def test_components():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1], [1, 0, 0, 0]]).bool()
    parts = components(mask)
    assert [int(part.sum()) for part in parts] == [2, 4, 2]
    assert torch.equal(torch.stack(parts).any(0), mask)
    snake = torch.ones(9, 9, dtype=torch.bool)
    snake[1::4, :-1], snake[3::4, 1:] = False, False
    assert len(components(snake)) == 1
    assert components(torch.zeros(3, 3, dtype=torch.bool)) == []


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return load_backbone()


def _overlap(a: torch.Tensor, b: tuple[int, ...]) -> float:
    low, high = torch.maximum(a[:2], torch.tensor(b[:2])), torch.minimum(a[2:], torch.tensor(b[2:]))
    inner = float((high - low).clamp(min=0).prod())
    return inner / (float((a[2:] - a[:2]).prod()) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def test_saliency_finds_things_and_tells_them_apart(embedded):
    """Single small objects of the playground; and the named one of two."""
    world = Playground(size=96, kinds=TRAIN_KINDS, styles=TRAIN_STYLES, seed=7)
    saliency = Saliency(embedded)
    single = [world.scene(i, kind=kind, count="one") for i, kind in enumerate(TRAIN_KINDS[:24])]
    overlaps = [_overlap(saliency(s.image, [s.objects[0].kind]).boxes[0], s.objects[0].box) for s in single]
    assert np.mean(overlaps) > 0.5
    pairs = [world.scene(i, relation=("left of", "above")[i % 2]) for i in range(24)]
    names = [[f"{o.colour} {o.kind}" for o in s.objects] for s in pairs]
    found = [detect(saliency, s.image, n) for s, n in zip(pairs, names, strict=True)]
    right = [_overlap(f.of(i), s.objects[i].box) for f, s in zip(found, pairs, strict=True) for i in (0, 1)]
    wrong = [_overlap(f.of(i), s.objects[1 - i].box) for f, s in zip(found, pairs, strict=True) for i in (0, 1)]
    assert np.mean(right) > 0.4
    assert np.mean(right) > 3 * np.mean(wrong)


def test_saliency_is_the_formula(embedded, image):
    saliency = Saliency(embedded, threshold=0.4, zoom=1.5)
    found = saliency(image, NAMES)
    patches = saliency.patches(image)
    assert patches.shape[0] * 60 == pytest.approx(patches.shape[1] * 40, rel=0.2), "the image's own shape"
    assert patches.shape[0] * patches.shape[1] == pytest.approx(36 * 1.5**2, rel=0.1)
    flat = patches.flatten(0, 1)
    mean = flat.mean(0) / flat.mean(0).norm()
    odd = 1 - (flat @ mean)
    odd = ((odd - odd.min()) / (odd.max() - odd.min())).view(patches.shape[:2])
    parts = components(odd >= 0.4)
    texts = embedded.encode_texts([f"a photo of a {name}." for name in NAMES])
    expected = sorted(((patches[part] @ t).mean().item() for part in parts for t in texts), reverse=True)
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert len(saliency(image, []).boxes) == 0
    assert len(saliency(Image.new("RGB", (900, 3)), NAMES).boxes) > 0


def test_saliency_encodes_a_name_once(embedded, image, monkeypatch):
    saliency, encoded = Saliency(embedded), []
    encode = embedded.encode_texts
    monkeypatch.setattr(embedded, "encode_texts", lambda texts: encoded.extend(texts) or encode(texts))
    first = saliency(image, ["cat", "dog", "cat"])
    saliency(image, ["dog", "star"])
    assert encoded == ["a photo of a cat.", "a photo of a dog.", "a photo of a star."]
    assert len(first.boxes) % 3 == 0


def test_where_detectors_come_from(embedded, owl, monkeypatch):
    assert isinstance(as_detector("saliency", embedded), Saliency)
    for path in (owl, str(owl)):
        found = as_detector(path, embedded)
        assert (type(found), found.name) == (ZeroShotDetector, str(owl))
    assert as_detector(test_components, embedded) is test_components
    with pytest.raises(ClipadaptError, match=r"callable .* not 3"):
        as_detector(3, embedded)  # type: ignore[arg-type]
    monkeypatch.setattr(Backbone, "capabilities", property(lambda self: frozenset({"texts", "patches"})))
    with pytest.raises(BackboneError, match="needs attention"):
        as_detector("saliency", embedded)
