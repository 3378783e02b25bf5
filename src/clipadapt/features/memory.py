"""An external memory of captions, alone or with their images, as features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipadapt.data import Dataset
from clipadapt.data.captions import read_captions
from clipadapt.data.pairs import Pairs
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features.classes import encode_classes
from clipadapt.features.encode import encode_images
from clipadapt.renamed import old_argument

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone


@old_argument("pictures", "images")
def encode_memory(
    backbone: Backbone, memory: Any, templates: Any = "photo", *, prefix: str = "", images: bool = True
) -> dict[str, Tensor]:
    """The features of a memory, on the CPU; a text that occurs several times is kept once, in the order of first use.

    Args:
        memory: sentences (a list, or a .txt or .jsonl file, one per line); `Pairs`; or another data set, whose texts
            are the sentences of its classes.
        templates: makes those sentences.
        prefix: put before each caption, but not before sentences of classes.
        images: whether images are encoded too.

    Returns:
        texts: (T, D) unit rows.
        images: (M, D) unit rows; M is 0 for sentences alone, and with `images` off.
        text_of: (M,) int64, the text of each image; an image with several captions is there once for each.

    Raises:
        ClipadaptError: the memory is none of these.
        DataError: the items of pairs are not images.
    """
    items: Any = memory
    if isinstance(memory, Pairs):
        names = memory.texts
        row_of_text = {text: row for row, text in enumerate(names)}
        text_of, items = [], []
        if images:
            if any(isinstance(item, str) for item in memory.items):
                raise DataError(f"{memory.name}: its items are texts, so there are no images to remember.")
            text_of = [row_of_text[text] for captions in memory.captions for text in captions]
            items = [item for item, captions in zip(memory.items, memory.captions, strict=True) for _ in captions]
    elif isinstance(memory, Dataset):
        row_of = {label: row for row, label in enumerate(dict.fromkeys(memory.labels))}
        names = [memory.class_names[label] for label in row_of] if len(memory) else memory.class_names
        text_of = [row_of[label] for label in memory.labels] if images else []
    elif isinstance(memory, str) and not memory.lower().endswith((".txt", ".jsonl")):
        raise ClipadaptError(f"memory = {memory!r} is a single string; give a list of sentences or a .txt file.")
    else:
        try:
            names, text_of = list(dict.fromkeys(read_captions(memory))), []
        except TypeError:
            names = [memory]
        if not all(isinstance(name, str) for name in names):
            raise ClipadaptError(
                "A memory is a list of sentences, a .txt or .jsonl file of them, a data set, or "
                f"clipadapt.data.image_pairs([(image, caption), ...]), not {type(memory).__name__} of something else."
            )
    if isinstance(memory, Dataset):
        texts = encode_classes(backbone, names, templates)
    else:
        texts = encode_classes(backbone, [prefix + name for name in names], "{}")
    seen = encode_images(backbone, items).features if text_of else torch.empty(0, backbone.dim)
    return {"texts": texts, "images": seen, "text_of": torch.tensor(text_of, dtype=torch.int64)}
