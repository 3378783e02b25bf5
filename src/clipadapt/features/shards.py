"""Encoding spread over many processes or machines: each writes its shard, the last step merges them."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clipadapt.data import as_items
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features.encode import encode_images
from clipadapt.features.store import written_aside

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone
