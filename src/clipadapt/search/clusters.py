"""Groups of images that look alike, named by the words that fit each better than the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipadapt.errors import ClipadaptError, DataError

if TYPE_CHECKING:
    from clipadapt.embeddings import Embeddings

_LEARNED = 50_000  # images that the centres are learned from, which bounds time and memory
_STARTS = 3
_WORDS = Path(__file__).with_name("words.txt")


@dataclass(frozen=True)
class Cluster:
    """One group of images.

    rows      (n,) its images, the nearest to its centre first
    scores    (n,) their cosines with the centre
    mean      (D,) mean of their features
    """

    rows: np.ndarray
    scores: np.ndarray
    mean: np.ndarray


def find_clusters(embeddings: Embeddings, k: int | None = None, *, seed: int = 1) -> list[Cluster]:
    """Divide images into k groups by k-means, the largest first; none is empty, so there can be fewer.

    K-means with k-means++ starts (scikit-learn's, the best of three) on unit rows, where squared distance is
    2 - 2 cosine: near in the one sense is near in the other. Centres are learned from at most 50,000 images, drawn
    by the seed, and then all are assigned, block by block. The same seed gives the same groups.

    Args:
        embeddings: N images.
        k: at least 2 and at most N; by default the root of N/2, between 2 and 50, a rule of thumb.
        seed: of the starts and of what is drawn.

    Raises:
        ClipadaptError: there are too few images, or k is out of range.
    """
    from sklearn.cluster import KMeans

    count = len(embeddings)
    if count < 2:
        raise ClipadaptError(f"{embeddings.folder} holds {count} images; groups need at least 2.")
    k = min(max(round((count / 2) ** 0.5), 2), 50) if k is None else k
    if not 2 <= k <= count:
        raise ClipadaptError(f"k must be from 2 to {count:,} for {count:,} images, not {k}.")
    rng = np.random.default_rng(seed)
    drawn = (
        np.sort(rng.choice(count, max(_LEARNED, k), replace=False)) if count > max(_LEARNED, k) else np.arange(count)
    )
    means = KMeans(k, n_init=_STARTS, random_state=seed).fit(_unit(embeddings.rows(drawn.tolist())))
    labels, scores = np.empty(count, np.int64), np.empty(count, np.float32)
    sums = np.zeros((k, embeddings.dim))
    centres = means.cluster_centers_ / np.linalg.norm(means.cluster_centers_, axis=1, keepdims=True).clip(1e-12)
    for first, block in embeddings.blocks():
        rows = _unit(block)
        here = labels[first : first + len(block)] = means.predict(rows)
        scores[first : first + len(block)] = np.einsum("nd,nd->n", rows, centres[here])
        np.add.at(sums, here, rows)
    found = []
    for label in range(k):
        rows = np.flatnonzero(labels == label)
        if len(rows):
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            found.append(Cluster(rows, scores[rows], (sums[label] / len(rows)).astype(np.float32)))
    return sorted(found, key=lambda cluster: (-len(cluster.rows), cluster.rows[0]))


def name_clusters(clusters: Sequence[Cluster], model: Any, words: Sequence[str], top: int = 3) -> list[list[str]]:
    """The `top` words that tell each cluster from the others, the best first.

    A word's worth for a cluster is its mean cosine with the images, minus the mean of that over the clusters: so no
    word that fits everything wins. Two clusters can have a word in common.

    Args:
        clusters: K groups.
        model: gives `encode_texts`: a backbone or an adapted model, the one the images were embedded with.
        words: V of them; each is put into "a photo of …".
        top: how many for each cluster.
    """
    sentences = [f"a photo of {word}" for word in words]
    with torch.no_grad():
        batches = [model.encode_texts(sentences[i : i + 256]).float().cpu() for i in range(0, len(sentences), 256)]
    similarity = np.stack([cluster.mean for cluster in clusters]) @ torch.cat(batches).numpy().T  # (K, V)
    order = np.argsort(similarity.mean(0) - similarity, axis=1, kind="stable")
    return [[words[v] for v in row[:top]] for row in order]


def read_words(file: str | Path | None = None) -> list[str]:
    """The words of a text file, one per line ("#" starts a comment line); without a file those that come along."""
    path = Path(file) if file is not None else _WORDS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of words: {error}.") from None
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")))
    if not words:
        raise DataError(f"{path} has no words; write one per line.")
    return words


def _unit(block: np.ndarray) -> np.ndarray:
    return torch.nn.functional.normalize(torch.from_numpy(block.astype(np.float32)), dim=1).numpy()
