"""What is searched for, as one vector: texts and pictures added up, what is not wanted taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipadapt.data import as_items
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.features.encoder import in_text_space

if TYPE_CHECKING:
    pass

Weighted = str | tuple[str, float]


def query_vector(
    model: Any,
    texts: str | Sequence[Weighted] = (),
    images: Any = (),
    minus: str | Sequence[Weighted] = (),
) -> np.ndarray:
    """The unit vector (D,) float32 of a query, to be compared with embeddings of pictures.

        query_vector(model, ["a red mug", ("on a table", 0.5)], images=["mug.jpg"], minus=["a cup"])

    The unit features of the parts are added with their weights, those of `minus` subtracted. As a product is linear,
    a picture's score is then the weighted sum of its cosines with the parts, over the length of that sum. In CLIP-like
    spaces pictures and texts lie apart (the modality gap, arXiv 2203.02053): any picture is closer to a picture than to
    a text. This raises the scores of all pictures by about the same and so hardly changes their order, but scores of
    a text query and of a picture query must not be compared.

    Args:
        model: a backbone, or an adapted model, whose text side and image tower encode the parts.
        texts: what the picture should show; each a text or (text, weight).
        images: pictures it should be like, each in a form that `as_items` takes, or (picture, weight).
        minus: texts of what it should not show, as `texts`; weights are positive here too.

    Raises:
        ClipadaptError: there is no part, a text is empty, a weight is not positive, or the parts cancel out.
        DataError: a picture cannot be read.
    """
    wanted, unwanted = _weighted(texts, "text"), _weighted(minus, "text to avoid")
    pictures = _weighted(images, "picture")
    if not (wanted or unwanted or pictures):
        raise ClipadaptError("A query needs a text or a picture.")
    features, weights = [], [w for _, w in wanted] + [-w for _, w in unwanted] + [w for _, w in pictures]
    if sentences := [text for text, _ in wanted + unwanted]:
        for sentence in sentences:
            if not isinstance(sentence, str) or not sentence.strip():
                raise ClipadaptError(f"A text to search by must have letters, and {sentence!r} has none.")
        with torch.no_grad():
            features.append(model.encode_texts(sentences).float().cpu())  # (T, D)
    if pictures:
        items = as_items([picture for picture, _ in pictures])
        features.append(encode_images(in_text_space(model.encoder), items, cache=False).features)  # (P, D)
    total = torch.tensor(weights, dtype=torch.float32) @ torch.cat(features)  # (D,)
    length = float(total.norm())
    if not length > 1e-4 * sum(map(abs, weights)):
        raise ClipadaptError("What is wanted and what is not cancel out: nothing is left to search for.")
    return (total / length).numpy()


def _weighted(parts: Any, what: str) -> list[tuple[Any, float]]:
    """The parts with their weights, 1 where none is given."""
    if not isinstance(parts, list | tuple):
        parts = [parts]
    pairs = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], int | float) or not 0 < pair[1] < float("inf"):
            raise ClipadaptError(f'A {what} comes alone or with a positive weight, as ("…", 0.5), not as {pair!r}.')
    return [(part, float(weight)) for part, weight in pairs]
