"""The embedded model before it is trained: a trunk, and a transformer that passes on the mean of the trunk's patches.

The joint space is that of an image classifier: its classes' weight vectors, centred, span it. Patches are projected to
its first directions; the transformer starts with attention that is nearly uniform and steps that are small, so that an
image's feature is nearly the mean of its patches, and what the classifier knows is there before any training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from clipadapt.backbones import Backbone
from clipadapt.backbones.families import Pretrained
from clipadapt.backbones.scratch import tower_configs
from clipadapt.backbones.trunk import HEAD, LITE0, STEM, TrunkClipConfig, TrunkClipModel, folded
from clipadapt.training.embedded.lessons import Lessons, templated

MEAN, DEVIATION = 127 / 255, 128 / 255  # of pixels, as the trunk was trained
SIZES = {"image_size": 160, "width": 256, "layers": 4, "heads": 4, "text_width": 256, "text_layers": 4, "text_heads": 4}
SCALE = 20.0  # of cosines, which are not in a narrow cone here as CLIP's are
WORD, RIDGE = 0.02, 1e-3  # size of a token's numbers; regularisation of the text tower's first projection
SMALL = 0.3  # of the steps of blocks behind the first: a step of zero would give prompts and low-rank pairs no gradient


def joint_space(classifier: Tensor, width: int) -> Tensor:
    """A classifier's weights (C, F) -> `width` orthonormal directions (width, F), those in which its classes differ."""
    return torch.linalg.svd(classifier - classifier.mean(0), full_matrices=False)[2][:width]


def class_directions(classifier: Tensor, width: int) -> Tensor:
    """Unit directions (C, width) of a classifier's classes in its joint space."""
    centred = classifier - classifier.mean(0)
    return nn.functional.normalize(centred @ joint_space(classifier, width).T, dim=1)


def new_embedded(
    weights: Mapping[str, Tensor], mean: Tensor, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **sizes: int
) -> Backbone:
    """The model to be trained, from the official weights of EfficientNet-Lite0.

    Args:
        weights: under their names in PyTorch, the classifier "_fc.weight" among them.
        mean: (1280,) of the trunk's pooled features of photos, which becomes the origin.
        tokenizer: of the text tower.
        seed: of all that is drawn.
        sizes: instead of single ones of SIZES.
    """
    size = SIZES | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TrunkClipModel(_config(size, tokenizer))
    vision: Any = model.vision_model
    trunk = vision.embeddings.patch_embedding
    space = joint_space(weights["_fc.weight"], size["width"])  # (W, 1280)
    with torch.no_grad():
        trunk.layers.load_state_dict(folded(weights))
        trunk.projection.weight.copy_(space[:, :, None, None])
        trunk.projection.bias.copy_(-space @ mean)
        vision.embeddings.class_embedding.zero_()
        vision.embeddings.position_embedding.weight.mul_(0.1)
        for number, block in enumerate(vision.encoder.layers):
            _quiet(block, first=number == 0)
        model.visual_projection.weight.copy_(torch.eye(size["width"]))
        model.logit_scale.fill_(math.log(SCALE))
    side = {"height": size["image_size"], "width": size["image_size"]}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size["image_size"]}, crop_size=side, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3
    )
    return Backbone("new:embedded", Pretrained("clip_trunk", model, processor, tokenizer))


@torch.no_grad()
def warm_texts(backbone: Backbone, words: np.ndarray, lessons: Lessons, *, texts: int = 20_000, seed: int = 0) -> None:
    """Make the text tower begin as a bag of words, in place: its tokens a teacher's, its projection in closed form.

    As in the image tower the first block passes on the mean. The projection is the ridge regression from what the
    tower then gives for lessons to their targets.

    Args:
        words: (V, F) the teacher's features of the tokens of the vocabulary.
    """
    tower: Any = backbone.model.text_model
    centred = torch.from_numpy(words - words.mean(0))
    table = tower.embeddings.token_embedding.weight
    rows = centred @ joint_space(centred, table.shape[1]).T  # (V, W)
    table.copy_(rows / rows.norm(dim=1).mean() * (WORD * table.shape[1] ** 0.5))
    tower.embeddings.position_embedding.weight.mul_(0.1)
    for number, block in enumerate(tower.encoder.layers):
        _quiet(block, first=number == 0)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(lessons.names), min(texts, len(lessons.names)), replace=False, p=lessons.shares)
    named = [templated(lessons.names[row][0], rng) for row in drawn]
    batches = [tower(input_ids=backbone.tokenize(named[first : first + 256])) for first in range(0, len(named), 256)]
    pooled = torch.cat([batch.pooler_output for batch in batches]).double()  # (T, W)
    gram = pooled.T @ pooled
    ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram + ridge, pooled.T @ torch.from_numpy(lessons.targets[drawn]).double())  # (W, D)
    backbone.model.text_projection.weight.copy_(solved.T)


def _quiet(block: Any, *, first: bool) -> None:
    """The first block adds the mean of the rows to each row, which outweighs what was there; others do little."""
    attention, mlp = block.self_attn, block.mlp
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2):
        nn.init.zeros_(linear.bias)
    if not first:
        attention.out_proj.weight.mul_(SMALL)
        mlp.fc2.weight.mul_(SMALL)
        return
    attention.q_proj.weight.mul_(0.1)
    attention.k_proj.weight.mul_(0.1)
    nn.init.eye_(attention.v_proj.weight)
    nn.init.eye_(attention.out_proj.weight).mul_(4)
    mlp.fc2.weight.mul_(SMALL)


def _config(size: Mapping[str, int], tokenizer: Any) -> TrunkClipConfig:
    both = {"vision_width": size["width"], "vision_layers": size["layers"], "vision_heads": size["heads"]}
    both |= {"projection_dim": size["width"], "context_length": tokenizer.model_max_length, "patch_size": 32}
    towers = tower_configs(tokenizer, {**size, **both})
    towers["vision_config"]["trunk"] = {"stages": [list(stage) for stage in LITE0], "stem": STEM, "head": HEAD}
    return TrunkClipConfig(**towers)
