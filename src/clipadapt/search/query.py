"""A query as one vector: wanted texts and images added, unwanted ones subtracted."""

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
    """The unit vector (D,) float32 of a query, to be compared with embeddings of images.

        query_vector(model, ["a red mug", ("on a table", 0.5)], images=["mug.jpg"], minus=["a cup"])

    The unit features of the parts are added with their weights, those of `minus` subtracted. As a product is linear,
    an image's score is then the weighted sum of its cosines with the parts, over the length of that sum. In CLIP-like
    spaces images and texts are far apart (the modality gap, arXiv 2203.02053): any image is closer to an image than to
    a text. This raises the scores of all images by about the same and so hardly changes their order, but scores of
    a text query and of an image query must not be compared.

    Args:
        model: a backbone, or an adapted model, whose text side and image tower encode the parts.
        texts: what the image should show; each a text or (text, weight).
        images: images it should be like, each in a form that `as_items` takes, or (image, weight).
        minus: texts of what it should not show, as `texts`; weights are positive here too.

    Raises:
        ClipadaptError: there is no part, a text is empty, a weight is not positive, or the parts cancel out.
        DataError: an image cannot be read.
    """
    wanted, unwanted = _with_weights(texts, "text"), _with_weights(minus, "text to avoid")
    examples = _with_weights(images, "image")
    if not (wanted or unwanted or examples):
        raise ClipadaptError("A query needs a text or an image.")
    features, weights = [], [w for _, w in wanted] + [-w for _, w in unwanted] + [w for _, w in examples]
    if sentences := [text for text, _ in wanted + unwanted]:
        for sentence in sentences:
            if not isinstance(sentence, str) or not sentence.strip():
                raise ClipadaptError(f"A text query must not be blank, and {sentence!r} is.")
        with torch.no_grad():
            features.append(model.encode_texts(sentences).float().cpu())  # (T, D)
    if examples:
        items = as_items([image for image, _ in examples])
        features.append(encode_images(in_text_space(model.encoder), items, cache=False).features)  # (P, D)
    total = torch.tensor(weights, dtype=torch.float32) @ torch.cat(features)  # (D,)
    length = float(total.norm())
    if not length > 1e-4 * sum(map(abs, weights)):
        raise ClipadaptError("The wanted and unwanted parts cancel out; nothing is left to search for.")
    return (total / length).numpy()


def _with_weights(parts: Any, what: str) -> list[tuple[Any, float]]:
    """The parts with their weights, 1 where none is given."""
    if not isinstance(parts, list | tuple):
        parts = [parts]
    pairs = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], int | float) or not 0 < pair[1] < float("inf"):
            raise ClipadaptError(f'A {what} is given alone or with a positive weight, as ("…", 0.5), not as {pair!r}.')
    return [(part, float(weight)) for part, weight in pairs]
