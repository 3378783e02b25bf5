"""An adapted model as ONNX files: run by onnxruntime, on machines and in languages that have no torch.

A folder gets
    image.onnx      pixels (N, 3, H, W) float32 -> features (N, D) of unit norm, logits (N, C): tower and head in one
    text.onnx       ids (T, L) int64, start and end included, zeros behind -> features (T, D); only where free texts are
                    encoded by the towers as they are, and not through learned prompts
    tokenizer.json  for the `tokenizers` library
    config.json     classes, transform of images, length of texts, where the model comes from; written last
and with int8 the same graphs again, `image.int8.onnx` and `text.int8.onnx`: weights of matrices in 8 bits, a scale
for each column, activations rounded as they come ("dynamic quantisation" of onnxruntime). This changes results.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import clipadapt
from clipadapt.backbones.families import FAMILIES
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.backbones.text import clean
from clipadapt.data import as_items
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.files import written_aside

if TYPE_CHECKING:
    from clipadapt.methods import Classifier

FORMAT = 1
TOLERANCE = 1e-4  # largest difference to torch: of a feature, and of a logit relative to the largest one
_TEXTS = ("a cat", "a photo of two red circles")


class _Image(nn.Module):
    def __init__(self, method: Classifier) -> None:
        super().__init__()
        # No modules: their weights are constants of the graph, and the logit scale is a number.
        self.encode, self.logits = method.encoder.encode, method.head.logits  # type: ignore[union-attr]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encode(pixels)  # (N, D)
        return features, self.logits(features)


class _Text(nn.Module):
    """`Backbone.encode_tokens` without its cut to the longest text, which depends on the values."""

    def __init__(self, method: Classifier) -> None:
        super().__init__()
        backbone: Any = method.backbone_
        self.model, self.pad, self.padding = backbone.model, backbone.pad_id, FAMILIES[backbone.family].padding

    def forward(self, ids: Tensor) -> Tensor:
        columns = torch.arange(ids.shape[1], device=ids.device)
        if self.padding == "causal":
            inputs = {"input_ids": ids}
        else:
            used = (ids != 0) & (ids != self.pad)
            inside = columns < torch.where(used, columns + 1, 1).amax(1, keepdim=True)  # (T, L)
            inputs = {"input_ids": torch.where(inside, ids, self.pad)}
            if self.padding == "masked":
                inputs["attention_mask"] = inside.long()
        return nn.functional.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)


def export_onnx(method: Classifier, folder: Path | str, *, int8: bool = False) -> Path:
    """Write a fitted method as ONNX; every graph is run and compared with torch before the folder counts as written.

    Raises:
        ClipadaptError: the method's prediction is not a graph from pixels to logits, or a package is missing.
        ArtifactError: `folder` holds other files.
    """
    _onnxruntime()
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists()):
        raise ArtifactError(f"{folder} holds other files; give a new folder.")
    backbone = method._model("it has no towers to export")
    if method.head is None:
        raise ClipadaptError(
            f"{method.card.key} cannot be exported: it looks at images, not at features, so its prediction is not a "
            "graph from pixels to logits."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # an older model does not count any more
    height, width = backbone.image_size
    pixels = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    key = method.card.key
    _write(_Image(method).eval(), pixels[:2], ("pixels",), ("features", "logits"), folder / "image.onnx", key)
    with torch.no_grad():
        expected = [method.encoder.encode(pixels), method.image_logits(pixels)[0]]
    _compare(folder / "image.onnx", pixels, expected, key)
    names = ["image"]
    if _texts_are_plain(method):
        causal = "causal-text" in backbone.capabilities
        ids = backbone.tokenize(list(_TEXTS))
        if not causal:
            ids = nn.functional.pad(ids, (0, backbone.context_length - ids.shape[1]))
        _write(_Text(method).eval(), ids, ("ids",), ("features",), folder / "text.onnx", key, length=causal)
        with torch.no_grad():
            _compare(folder / "text.onnx", ids[1:], [backbone.encode_tokens(ids[1:])], key)
        with written_aside(folder / "tokenizer.json") as aside:
            backbone.tokenizer.backend_tokenizer.save(str(aside))
        names.append("text")
    if int8:
        for name in names:
            _quantise(folder / f"{name}.onnx", folder / f"{name}.int8.onnx")
    config = {
        "format": FORMAT,
        "clipadapt": clipadapt.__version__,
        "method": key,
        "backbone": method.origin_,
        "class_names": method.class_names_,
        "multi_label": method.multi_label_,
        "threshold": method.threshold_ if method.multi_label_ else None,
        "dim": backbone.dim,
        "preprocess": backbone.preprocess.to_config() if isinstance(backbone.preprocess, Preprocess) else None,
        "texts": {
            "context_length": backbone.context_length,
            "fixed_length": "causal-text" not in backbone.capabilities,
            "specials": backbone.tokenizer.all_special_tokens,
        }
        if "text" in names
        else None,
        "int8": int8,
    }
    with written_aside(folder / "config.json") as aside:
        aside.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


class OnnxModel:
    """What `export_onnx` wrote, run by onnxruntime; nothing of it needs the backbone.

    class_names  C names
    """

    def __init__(self, folder: Path | str, *, int8: bool = False, threads: int = 0) -> None:
        """Open a folder; `int8` for its 8-bit graphs; `threads` of onnxruntime, 0 for all cores."""
        self.folder = Path(folder)
        try:
            self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            if self.config["format"] > FORMAT:
                raise ArtifactError(f"{self.folder} has format {self.config['format']}: upgrade clipadapt.")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self.folder} is not an exported model, or its config.json is damaged: {error}."
            ) from None
        if int8 and not self.config["int8"]:
            raise ArtifactError(f"{self.folder} was exported without int8; export it again with int8.")
        self.class_names: list[str] = self.config["class_names"]
        ending = ".int8.onnx" if int8 else ".onnx"
        self._image = _session(self.folder / f"image{ending}", threads)
        self._text = _session(self.folder / f"text{ending}", threads) if self.config["texts"] else None

    def run(self, images: Any, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Unit features (N, D) and logits (N, C) of images in any usual form, or of pixels (N, 3, H, W)."""
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4 and images.shape[1] == 3:
            pixels = np.asarray(images, np.float32)
        elif self.config["preprocess"] is None:
            raise ClipadaptError("The backbone has a custom image transform, which cannot be exported: give pixels.")
        else:
            transform = Preprocess.from_config(self.config["preprocess"])
            decoded = [transform(item.open()).numpy() for item in as_items(images)]
            pixels = np.stack(decoded) if decoded else np.empty((0, 3, *self._image.get_inputs()[0].shape[2:]))
        parts = [pixels[i : i + batch_size].astype(np.float32) for i in range(0, max(len(pixels), 1), batch_size)]
        features, logits = zip(*(self._image.run(None, {"pixels": part}) for part in parts), strict=True)
        return np.concatenate(features), np.concatenate(logits)

    def predict_proba(self, images: Any) -> np.ndarray:
        """Class probabilities (N, C), as `Method.predict_proba` gives them."""
        logits = self.run(images)[1]
        if self.config["multi_label"]:
            return 1 / (1 + np.exp(self.config["threshold"] - logits))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """T texts -> unit features (T, D)."""
        if self._text is None:
            raise ClipadaptError(f"{self.folder} has no text tower: this model encodes texts with learned prompts.")
        from tokenizers import Tokenizer

        facts = self.config["texts"]
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.enable_truncation(facts["context_length"])
        tokenizer.no_padding()
        rows = [encoding.ids for encoding in tokenizer.encode_batch([clean(t, facts["specials"]) for t in texts])]
        length = facts["context_length"] if facts["fixed_length"] else max(map(len, rows))
        ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)  # (T, L)
        return self._text.run(None, {"ids": ids})[0]


def _texts_are_plain(method: Classifier) -> bool:
    """Whether free texts go through the towers in `backbone_` and nothing else, and a tokenizer can be written."""
    backbone: Any = method.backbone_
    return method.plain_texts and "texts" in backbone.capabilities and hasattr(backbone.tokenizer, "backend_tokenizer")


def _write(
    module: nn.Module,
    example: Tensor,
    inputs: tuple[str],
    outputs: tuple[str, ...],
    file: Path,
    key: str,
    *,
    length: bool = False,
) -> None:
    """Export a module with any number of rows, and with `length` any number of columns."""
    axes: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    if length:
        axes[1] = torch.export.Dim.DYNAMIC
    try:
        with _quietly(), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=(axes,),
                verbose=False,
            )
    except Exception as error:  # anything the exporter cannot follow
        raise ClipadaptError(
            f"{key} cannot be exported: its prediction is not a fixed graph ({type(error).__name__})."
        ) from error
    with written_aside(file) as aside:
        program.save(str(aside), include_initializers=True, external_data=False)


def _compare(file: Path, example: Tensor, expected: list[Tensor], key: str) -> None:
    """Refuse a graph that gives something else than torch, also for other numbers of rows than it was made with."""
    session = _session(file, 0)
    name = session.get_inputs()[0].name
    for rows in (slice(None), slice(0, 1)):
        for got, wanted in zip(session.run(None, {name: example[rows].numpy()}), expected, strict=True):
            reference = wanted[rows].numpy()
            limit = TOLERANCE * max(1.0, float(np.abs(reference).max(initial=0)))
            if got.shape != reference.shape or np.abs(got - reference).max(initial=0) > limit:
                raise ClipadaptError(
                    f"{key} cannot be exported: it does not predict from pixels to features to "
                    "logits, and the graph would not predict the same."
                )


def _quantise(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    matrices = ["MatMul", "Gemm"]
    with _quietly(), written_aside(target) as aside:
        quantize_dynamic(source, aside, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=matrices)


def _session(file: Path, threads: int) -> Any:
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception type for every cause
        raise ArtifactError(f"{file} is missing or damaged: {error}.") from None


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise ClipadaptError('ONNX needs an extra: pip install "clipadapt[onnx]".') from None
    return onnxruntime


@contextmanager
def _quietly() -> Any:
    """Without the exporters' notes on packages that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
