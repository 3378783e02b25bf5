"""FSDP2 takes a backbone apart although CLIP's logit scale is a scalar, which it cannot shard."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clipadapt.backbones import Backbone


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_blocks_are_sharded_and_the_logit_scale_is_left_out(clip: Backbone, pixels, texts, one_process):
    other = clip.copy()
    assert other.model.logit_scale.ndim == 0
    with pytest.raises(ValueError, match="scalar parameters"):
        fully_shard(copy.deepcopy(other.model), mesh=one_process)
    for tower in ("text", "vision"):
        for block in other.blocks(tower):
            fully_shard(block, mesh=one_process)
    fully_shard(other.model, mesh=one_process, ignored_params={other.model.logit_scale})
    fully_shard_methods = ("get_image_features", "get_text_features")
    for name in fully_shard_methods:  # the root gathers its weights around these too, not only around forward
        distributed.fsdp.register_fsdp_forward_method(other.model, name)
    with torch.no_grad():
        torch.testing.assert_close(other.encode_images(pixels), clip.encode_images(pixels))
        torch.testing.assert_close(other.encode_texts(texts), clip.encode_texts(texts))
    assert other.logit_scale == clip.logit_scale
