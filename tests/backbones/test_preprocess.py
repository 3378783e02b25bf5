"""Our preprocessing equals transformers' PIL image processors bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ChineseCLIPImageProcessorPil, CLIPImageProcessorPil, Siglip2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from clipadapt.backbones.preprocess import Preprocess

SIZES = [(64, 48), (37, 91), (500, 333), (224, 224), (225, 224), (1, 1), (7, 300), (333, 500), (31, 32)]
MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "PA"]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    "clip-48": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    "crop-larger": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 41, "width": 36}),
    "chinese-clip": ChineseCLIPImageProcessorPil(),
    "siglip": SiglipImageProcessorPil(size={"height": 40, "width": 56}),
    "siglip-bilinear": SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2),
    "no-resize": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 50, "width": 50}),
    "no-normalise": CLIPImageProcessorPil(do_normalize=False),
    "no-rescale": CLIPImageProcessorPil(do_rescale=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_equal_over_sizes(name, size):
    processor = PROCESSORS[name]
    expected = torch.as_tensor(processor(picture(size), return_tensors="np")["pixel_values"][0])
    ours = Preprocess.from_config(processor.to_dict())(picture(size))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected.float())


@pytest.mark.parametrize("mode", MODES)
def test_equal_over_modes(mode):
    processor = PROCESSORS["clip-48"]
    image = picture((61, 50), mode)
    expected = torch.as_tensor(processor(image, return_tensors="np")["pixel_values"][0])
    assert torch.equal(Preprocess.from_config(processor.to_dict())(image), expected)


def test_equal_with_a_transparent_colour():
    image = picture((40, 40), "RGB")
    image.info["transparency"] = image.getpixel((3, 3))
    expected = PROCESSORS["clip-48"](image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(Preprocess.from_config(PROCESSORS["clip-48"].to_dict())(image), expected)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_thread_of_a_picture_takes_no_memory(size):
    """Its shortest side enlarged to 224 would be 13 million pixels long."""
    assert Preprocess()(picture(size)).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(64, 64), (33, 33)])
def test_equal_to_naflex_on_square_pictures(size):
    """SigLIP 2's flexible processor keeps the aspect ratio; we use its square for every picture."""
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    ours = Preprocess.from_config(processor.to_dict())(picture(size))
    flat = processor(picture(size), return_tensors="pt")["pixel_values"][0]  # (16, 8 * 8 * 3)
    expected = flat.reshape(4, 4, 8, 8, 3).permute(4, 0, 2, 1, 3).reshape(3, 32, 32)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", PROCESSORS)
def test_written_configuration_means_the_same(name):
    transform = Preprocess.from_config(PROCESSORS[name].to_dict())
    config = {key: value for key, value in transform.to_config().items() if key != "image_processor_type"}
    assert Preprocess.from_config(CLIPImageProcessorPil(**config).to_dict()) == transform


@pytest.mark.parametrize(("resize", "crop"), [(32, (32, 32)), (40, (32, 24)), ((32, 48), None), (20, (32, 32))])
@pytest.mark.parametrize("size", [(64, 64), (90, 40), (30, 120)])
def test_seen_is_the_part_that_is_left(resize, crop, size):
    """A picture whose red rises from left to right and whose green rises downwards tells what became of its edges."""
    width, height = size
    red = np.tile((np.arange(width) + 0.5) / width, (height, 1))
    green = np.tile(((np.arange(height) + 0.5) / height)[:, None], (1, width))
    values = np.stack([red, green, np.zeros_like(red)], axis=2) * 255
    transform = Preprocess(resize=resize, crop=crop, resample=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    left, top, right, bottom = transform.seen(size)
    pixels = transform(Image.fromarray(values.round().astype(np.uint8))).numpy()
    if crop is not None and (pixels.max(axis=0) == 0).any():  # black around what was too small: all of it is seen
        assert (left, right) == (0, 1) or (top, bottom) == (0, 1)
        return
    across, down = pixels[0].mean(axis=0), pixels[1].mean(axis=1)
    step = (right - left) / len(across), (bottom - top) / len(down)
    np.testing.assert_allclose(across, left + (np.arange(len(across)) + 0.5) * step[0], atol=0.03)
    np.testing.assert_allclose(down, top + (np.arange(len(down)) + 0.5) * step[1], atol=0.03)


def test_bytes_of_the_right_size_become_what_the_image_becomes():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    transform = Preprocess(resize=8, crop=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = torch.stack([transform(Image.fromarray(one)) for one in pixels])
    assert torch.equal(transform.of_bytes(torch.from_numpy(pixels).permute(0, 3, 1, 2)), images)
