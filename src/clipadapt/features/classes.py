"""Class names to features: the mean of each class's sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import class_texts

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone


def encode_classes(
    backbone: Backbone,
    class_names: Sequence[str],
    templates: str | Path | Sequence[str] | Mapping[str, Sequence[str]] = "photo",
    *,
    batch_size: int = 256,
) -> torch.Tensor:
    """One unit vector per class, (C, D) float32 on the CPU: the classifier of zero-shot CLIP.

    A class's vector is the mean of the unit-norm features of its sentences, brought to unit norm again (prompt
    ensembling of arXiv 2103.00020, section 3.1.4). Sentences that classes share are encoded once. No gradient flows.

    Args:
        backbone: gives `encode_texts` and `dim`; for `PublishedFeatures`, the classes' features are returned.
        class_names: C names.
        templates: what `clipadapt.data.class_texts` takes: a shipped set's name, a template with "{}", a list of
            them, a file, or a mapping from class to sentences.
        batch_size: sentences per call of the model.
    """
    if isinstance(backbone, PublishedFeatures):
        return backbone.encode_classes(class_names)
    texts = class_texts(class_names, templates)
    # Towers that read text at its true length pay for the longest of a batch: sentences of like length go together.
    unique = sorted({text for sentences in texts for text in sentences}, key=lambda text: (len(text), text))
    with torch.no_grad():
        batches = [backbone.encode_texts(unique[i : i + batch_size]) for i in range(0, len(unique), batch_size)]
    features = torch.cat([torch.empty(0, backbone.dim), *(batch.float().cpu() for batch in batches)])  # (T, D)
    row_of = {text: row for row, text in enumerate(unique)}
    means = [features[[row_of[text] for text in sentences]].mean(0) for sentences in texts]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1) if means else features
