"""The teacher's map meets its points where it is not regularised; its sentence encoder is a plain BERT with a mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipadapt.errors import DataError
from clipadapt.training.embedded.teacher import SentenceEncoder, TextMap, unit
from tests.sentence_encoder import write_sentence_encoder


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(30, 12))), unit(rng.normal(size=(30, 5)))


def test_without_regularisation_every_point_is_met(rows):
    points, directions = rows
    np.testing.assert_allclose(TextMap(points, directions, ridge=1e-9)(points), directions, atol=1e-5)


def test_it_is_kernel_ridge_regression(rows):
    """Against scikit-learn."""
    from sklearn.kernel_ridge import KernelRidge

    points, directions = rows
    other = unit(np.random.default_rng(1).normal(size=(7, 12)))
    plain = KernelRidge(alpha=0.3, kernel="rbf", gamma=1.5).fit(points, directions).predict(other)
    found = TextMap(points, directions, width=1.5, ridge=0.3)(3 * other)
    np.testing.assert_allclose(found, unit(plain), atol=1e-6)


def test_sentences_are_the_mean_of_their_rows(tmp_path):
    tokenizer, model = write_sentence_encoder(tmp_path, 24)
    texts = ["a photo of a cat", "star", "the small red house and the dog"]
    found = SentenceEncoder(tmp_path)(texts, batch_size=2)
    for text, row in zip(texts, found, strict=True):
        inputs = {"input_ids": torch.tensor([tokenizer.encode(text).ids])}
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, unit(mean), atol=1e-5)
    with pytest.raises(DataError, match="holds no sentence encoder"):
        SentenceEncoder(tmp_path / "nothing")
