"""Class vectors: unit-norm means of unit-norm sentences, whatever the batches."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from clipadapt.features import encode_classes


def test_one_template_gives_the_sentence_itself(backbone):
    features = encode_classes(backbone, ["cat", "dog"], "a photo of a {}.")
    torch.testing.assert_close(features, backbone.encode_texts(["a photo of a cat.", "a photo of a dog."]))


def test_several_templates_are_averaged_and_brought_to_unit_norm(backbone):
    features = encode_classes(backbone, ["cat", "dog", "emu"], ["a {}.", "the big {}.", "{}"])
    emu = normalize(backbone.encode_texts(["a emu.", "the big emu.", "emu"]).mean(0), dim=0)
    torch.testing.assert_close(features[2], emu)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_batches_do_not_matter_and_shared_sentences_are_encoded_once(backbone):
    sentences = {"cat": ["an animal.", "a cat, rather small."], "dog": ["an animal.", "a dog."], "emu": ["a bird."]}
    whole = encode_classes(backbone, list(sentences), sentences)
    assert backbone.seen == 4
    torch.testing.assert_close(encode_classes(backbone, list(sentences), sentences, batch_size=1), whole)
    assert backbone.batch_sizes == [4, 1, 1, 1, 1]


def test_order_of_classes(backbone):
    features = encode_classes(backbone, ["cat", "dog", "emu"], "imagenet-7")
    reordered = encode_classes(backbone, ["emu", "cat", "dog"], "imagenet-7")
    torch.testing.assert_close(reordered, features[[2, 0, 1]])


def test_no_class(backbone):
    assert encode_classes(backbone, [], "a photo of a {}.").shape == (0, 8)
