"""Exact retrieval against the plain full product, and memories in every form."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from clipadapt.backbones import load_backbone
from clipadapt.data import Pairs, image_pairs
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features import encode_classes, encode_images
from clipadapt.features.memory import encode_memory
from clipadapt.features.retrieval import nearest, top
from tests.images import colours
from tests.tiny import tiny_clip


def plain(queries: torch.Tensor, memory: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores, order = (queries @ memory.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], order[:, :k]


@pytest.mark.parametrize("cells", [1, 7, 64, 1 << 24])
@pytest.mark.parametrize("k", [1, 3, 40, 100])
def test_equals_the_full_product(cells, k):
    generator = torch.Generator().manual_seed(0)
    queries = normalize(torch.randn(9, 6, generator=generator, dtype=torch.float64), dim=1)
    memory = normalize(torch.randn(40, 6, generator=generator, dtype=torch.float64), dim=1)
    scores, indices = nearest(queries, memory, k, cells=cells)
    expected, places = plain(queries, memory, k)
    assert indices.shape == (9, min(k, 40))
    torch.testing.assert_close(scores, expected)
    assert torch.equal(indices, places)


@pytest.mark.parametrize("cells", [1, 16, 1 << 24])
@pytest.mark.parametrize("k", [1, 2, 5, 11, 30])
def test_ties_go_to_the_lowest_index(cells, k):
    # halves multiply and add without rounding, so equal rows have equal scores whatever the block
    generator = torch.Generator().manual_seed(1)
    memory = torch.randint(-1, 2, (30, 3), generator=generator) / 2
    queries = torch.randint(-1, 2, (12, 3), generator=generator) / 2
    scores, indices = nearest(queries, memory, k, cells=cells)
    expected, places = plain(queries, memory, k)
    assert torch.equal(scores, expected)
    assert torch.equal(indices, places)


def test_top_orders_equals_by_column_even_where_nothing_is_finite():
    scores = torch.tensor([[0.5, 1.0, 0.5, 0.5], [-torch.inf, -torch.inf, 2.0, -torch.inf]])
    values, columns = top(scores, 2)
    assert columns.tolist() == [[1, 0], [2, 0]]
    assert values.tolist() == [[1.0, 0.5], [2.0, -torch.inf]]


def test_nothing_to_search():
    scores, indices = nearest(torch.ones(3, 2), torch.empty(0, 2), 5)
    assert scores.shape == indices.shape == (3, 0)
    scores, indices = nearest(torch.empty(0, 2), torch.ones(4, 2), 3)
    assert scores.shape == indices.shape == (0, 3)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ClipadaptError, match="k must be at least 1, not 0"):
        nearest(torch.ones(1, 2), torch.ones(1, 2), 0)
    with pytest.raises(ClipadaptError, match="must be"):
        nearest(torch.ones(1, 2), torch.ones(1, 3), 1)


# -- memories ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    return load_backbone(tiny_clip())


def test_a_memory_of_sentences(tower, tmp_path):
    sentences = ["a red cat", "the blue house", "a red cat"]
    memory = encode_memory(tower, sentences)
    with torch.no_grad():
        expected = tower.encode_texts(sentences[:2])
    torch.testing.assert_close(memory["texts"], expected)
    assert memory["images"].shape == (0, 16)
    assert memory["text_of"].shape == (0,)
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(sentences) + "\n")
    for path in (file, str(file)):
        assert torch.equal(encode_memory(tower, path)["texts"], memory["texts"])
    with torch.no_grad():
        expected = tower.encode_texts(["a photo of a red cat", "a photo of the blue house"])
    torch.testing.assert_close(encode_memory(tower, sentences, prefix="a photo of ")["texts"], expected)


def test_a_memory_of_labelled_images(tower):
    data = colours(2, seed=1).select([7, 6, 0, 1])  # yellow, yellow, red, red
    memory = encode_memory(tower, data)
    assert torch.equal(memory["texts"], encode_classes(tower, ["yellow", "red"]))
    assert torch.equal(memory["images"], encode_images(tower, data).features)
    assert memory["text_of"].tolist() == [0, 0, 1, 1]
    assert encode_memory(tower, data, images=False)["images"].shape == (0, 16)


def test_a_memory_of_pairs(tower):
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    pairs = image_pairs(zip(images, ["a red star", "a star", "a red star"], strict=True))
    assert isinstance(pairs, Pairs)
    memory = encode_memory(tower, pairs)
    with torch.no_grad():
        torch.testing.assert_close(memory["texts"], tower.encode_texts(["a red star", "a star"]))
    assert memory["text_of"].tolist() == [0, 1, 0]
    assert memory["images"].shape == (3, 16)
    assert repr(pairs) == "Pairs('pairs': 3 images, 2 captions)"


def test_a_memory_of_images_with_several_captions(tower):
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]
    pairs = image_pairs([(images[0], ["a red star", "a star"]), (images[1], "a star")])
    memory = encode_memory(tower, pairs)
    assert memory["text_of"].tolist() == [0, 1, 1]
    assert torch.equal(memory["images"], encode_images(tower, [images[0], images[0], images[1]]).features)
    assert encode_memory(tower, pairs, images=False)["images"].shape == (0, 16)
    with pytest.raises(DataError, match="no image"):
        encode_memory(tower, Pairs(["un chat"], [("a cat",)]))


def test_what_is_no_memory_is_refused(tower):
    for wrong in (3, [Image.new("RGB", (8, 8))], [("image", "caption")]):
        with pytest.raises(ClipadaptError, match="A memory is"):
            encode_memory(tower, wrong)
    with pytest.raises(ClipadaptError, match="single string"):
        encode_memory(tower, "a red cat")
    with pytest.raises(DataError, match="pair 0"):
        image_pairs([(Image.new("RGB", (8, 8)), " ")])
    with pytest.raises(DataError, match="no pair"):
        image_pairs([])
