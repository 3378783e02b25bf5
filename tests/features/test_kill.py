"""kill -9 in the middle of encoding: what was written stays whole, and only the rest is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipadapt.features import encode_images

# A process that encodes the images of argv[2:] with the backbone of argv[1], one batch of two at a time.
ENCODE = """
import runpy, sys, time
from clipadapt.features import encode_images, store

backbone = runpy.run_path(sys.argv[1])["CountingBackbone"]()
encode, store.PART_SECONDS = backbone.encode_images, 0.0

def encode_slowly(pixels):
    time.sleep(0.02)
    return encode(pixels)

backbone.encode_images = encode_slowly
encode_images(backbone, sys.argv[2:], batch_size=2)
print(backbone.seen)
"""


def start(paths: list[str]) -> subprocess.Popen:
    conftest = str(Path(__file__).with_name("conftest.py"))
    return subprocess.Popen([sys.executable, "-c", ENCODE, conftest, *paths], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def parts():
    return lambda: list(Path(os.environ["CLIPADAPT_CACHE"]).rglob("*.safetensors"))


def wait_for(parts, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(parts()) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_killed_run_is_continued(backbone, paths, parts):
    process = start(paths)
    wait_for(parts, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    written = 2 * len(parts())
    assert 8 <= written < 30

    encoded = encode_images(backbone, paths)
    assert backbone.seen == 30 - written
    torch.testing.assert_close(encoded.features, backbone.plain([Image.open(path) for path in paths]))


def test_two_processes_may_fill_one_cache(backbone, paths, parts):
    process = start(paths)
    wait_for(parts, 1)
    encoded = encode_images(backbone, paths[::-1], batch_size=2)
    assert process.communicate()[0] == "30\n"
    torch.testing.assert_close(encoded.features.flip(0), backbone.plain([Image.open(path) for path in paths]))
    computed = backbone.seen
    torch.testing.assert_close(encode_images(backbone, paths).features, encoded.features.flip(0))
    assert backbone.seen == computed
