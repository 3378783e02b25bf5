"""A backbone of a few numbers that counts its work, and images to feed it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipadapt.data import Item


class CountingBackbone:
    """What the features need of a backbone; `seen` and `preprocessed` count images."""

    dim = 8
    device = torch.device("cpu")
    image_size = (16, 12)  # (H, W)
    aligned = True
    kind = "backbone"

    def __init__(self, seed: int = 0) -> None:
        self.source = f"counting {seed}"
        self.fingerprint = self.image_fingerprint = f"counting-{seed}"
        self.projection = torch.randn(3 * 16 * 12, self.dim, generator=torch.Generator().manual_seed(seed))
        self.seen = self.preprocessed = 0
        self.batch_sizes: list[int] = []
        self.threads: set[str] = set()

    @property
    def encoder(self) -> CountingBackbone:
        return self

    def prepare(self, item: Item) -> torch.Tensor:
        return self.preprocess(item.open())

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        return self.encode_images(batch)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        self.preprocessed += 1
        self.threads.add(threading.current_thread().name)
        values = np.asarray(image.resize((12, 16)), np.float32) / 127.5 - 1
        return torch.from_numpy(values).permute(2, 0, 1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        self.batch_sizes.append(len(pixels))
        return torch.nn.functional.normalize(pixels.flatten(1) @ self.projection, dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        self.seen += len(texts)
        self.batch_sizes.append(len(texts))
        rows = [np.random.default_rng(list(text.encode())).normal(size=self.dim) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(np.array(rows), dtype=torch.float32), dim=-1)

    def plain(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, D): the features without anything of clipadapt around the model."""
        return self.encode_images(torch.stack([self.preprocess(image.convert("RGB")) for image in images]))


def noise(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_images(folder: Path, count: int) -> list[str]:
    """`count` different lossless images of different sizes; their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number:04d}.png") for number in range(count)]
    for number, path in enumerate(paths):
        noise(number, (15 + number % 7, 20 + number % 5)).save(path)
    return paths


@pytest.fixture
def backbone() -> CountingBackbone:
    return CountingBackbone()


@pytest.fixture
def other_backbone() -> CountingBackbone:
    return CountingBackbone(seed=1)


@pytest.fixture
def paths(tmp_path) -> list[str]:
    return write_images(tmp_path / "images", 30)
