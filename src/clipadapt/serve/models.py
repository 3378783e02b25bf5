"""The models that are served: several on one image tower, each in one revision at a time, reloaded when it changes.

Everything that touches a model runs in the batcher's one thread: methods put hooks on towers that others share.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.data import BytesItem
from clipadapt.data.items import hash_bytes
from clipadapt.errors import ArtifactError, ClipadaptError, unknown_name
from clipadapt.features import encode_images
from clipadapt.features.encoder import in_text_space
from clipadapt.methods import load
from clipadapt.methods.artifact import origin_of
from clipadapt.search.query import query_vector
from clipadapt.serve.limits import check_image, open_image
from clipadapt.serve.log import log

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of an image


class EncodedImage(NamedTuple):
    """An image of a request, not yet opened."""

    name: str  # what people call it in a sentence: "Image 2"
    data: bytes


class Pixels(NamedTuple):
    """An image ready for an image tower."""

    digest: str
    values: Tensor  # (3, H, W)


@dataclass(frozen=True)
class Tower:
    """An image tower; two are equal where they compute the same features of the same pixels."""

    fingerprint: str
    encode: Callable[[Tensor], Tensor] = field(compare=False, repr=False)  # (B, 3, H, W) -> (B, K)
    preprocess: Callable[[Image.Image], Tensor] = field(compare=False, repr=False)
    device: torch.device = field(compare=False, repr=False)

    def prepare(self, image: EncodedImage, max_pixels: int) -> Pixels:
        """Decode and preprocess, in any thread."""
        decoded = open_image(image.data, image.name, max_pixels)
        return Pixels(hash_bytes(image.data), self.preprocess(decoded))

    def features(self, images: Sequence[Pixels]) -> Tensor:
        """(B, K) on the CPU; equal images are encoded once."""
        rows = {digest: row for row, digest in enumerate(dict.fromkeys(image.digest for image in images))}
        pixels = {image.digest: image.values for image in images}
        with torch.no_grad():
            found = self.encode(torch.stack([pixels[digest] for digest in rows]).to(self.device))
        return found.float().cpu()[[rows[image.digest] for image in images]]


@dataclass(frozen=True, eq=False)
class Served:
    """One model in one revision.

    id         what requests call it
    model      an adapted model, or a backbone as it is
    revision   SHA-256 of the model's config.json, or the backbone's fingerprint
    tower      the image tower; None if the method looks at images themselves
    image_fingerprint  of embeddings that queries of this model may be compared with
    """

    id: str
    model: Any
    revision: str
    tower: Tower | None
    image_fingerprint: str

    @property
    def method(self) -> Any:
        """The adapted model; None if a backbone is served as it is."""
        return None if self.model.kind == "backbone" else self.model

    @property
    def backbone(self) -> Backbone:
        """The towers, adapted where the model adapts them."""
        return self.model if self.method is None else self.model.backbone_

    @property
    def class_names(self) -> list[str]:
        return [] if self.method is None else self.method.class_names_

    def prepare(self, image: EncodedImage, max_pixels: int) -> Pixels | BytesItem:
        """What the tasks below take of an image; decoded here, unless the method wants to do that itself."""
        if self.tower is not None:
            return self.tower.prepare(image, max_pixels)
        check_image(image.data, image.name, max_pixels)
        return BytesItem(image.name, image.data)

    def on_backbone(self, image: EncodedImage, max_pixels: int) -> tuple[Tensor, Box]:
        """Pixels (3, H, W) for the towers themselves, whatever the method does, and the part of the image in them."""
        decoded, preprocess = open_image(image.data, image.name, max_pixels), self.backbone.preprocess
        box = preprocess.seen(decoded.size) if isinstance(preprocess, Preprocess) else (0.0, 0.0, 1.0, 1.0)
        return preprocess(decoded), box

    def describe(self) -> dict[str, Any]:
        """What clients are told; of the backbone's folder only the name, since paths are the server's own."""
        method = self.method
        origin = method.origin_ if method is not None else None  # of a plain backbone, what it is itself
        source = origin["source"] if origin is not None else self.backbone.source
        return {
            "id": self.id,
            "method": method.card.key if method is not None else None,
            "classes": self.class_names,
            "multi_label": method.multi_label_ if method is not None else False,
            "revision": self.revision,
            "backbone": {
                "source": Path(source).name if Path(source).is_absolute() else source,
                "fingerprint": origin["fingerprint"] if origin is not None else self.revision,
            },
        }


_NOTHING = ("", "a photo.", "a picture of something.")

# -- tasks of the batcher ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classify:
    """(pixels, model) -> probabilities (C,). The tower sees each image once, whatever models ask for it."""

    tower: Tower

    def __call__(self, items: Sequence[tuple[Pixels, Served]]) -> list[Tensor]:
        features = self.tower.features([pixels for pixels, _ in items])  # (B, K)
        answers: dict[int, Tensor] = {}
        for served in dict.fromkeys(served for _, served in items):
            rows = [row for row, (_, asked) in enumerate(items) if asked is served]
            with torch.no_grad():
                probabilities = served.model.probabilities(served.model.head.logits(features[rows]))  # (len(rows), C)
            answers |= zip(rows, probabilities, strict=True)
        return [answers[row] for row in range(len(items))]


@dataclass(frozen=True)
class ClassifyWhole:
    """(image, model) -> probabilities (C,), for a method that looks at images and not at features."""

    served: Served

    def __call__(self, items: Sequence[tuple[BytesItem, Served]]) -> list[Tensor]:
        logits, _ = self.served.model.image_logits([image for image, _ in items])
        return list(self.served.model.probabilities(logits))


@dataclass(frozen=True)
class EmbedTexts:
    """text -> (unit feature (D,), number of tokens)."""

    served: Served

    def __call__(self, items: Sequence[str]) -> list[tuple[Tensor, int]]:
        with torch.no_grad():
            features = self.served.model.encode_texts(items).float().cpu()  # (T, D)
        used = self.served.backbone.tokenize(items) != 0  # (T, L); zeros only fill, but for words that are called 0
        lengths = torch.where(used, torch.arange(1, used.shape[1] + 1), 0).amax(1)
        return list(zip(features, lengths.tolist(), strict=True))


@dataclass(frozen=True)
class EmbedImages:
    """image -> unit feature (D,) in the space of the model's texts."""

    served: Served

    def __call__(self, items: Sequence[Pixels | BytesItem]) -> list[Tensor]:
        encoder = in_text_space(self.served.model.encoder)
        if self.served.tower is not None:
            return list(self.served.tower.features([item for item in items if isinstance(item, Pixels)]))
        return list(encode_images(encoder, items, cache=False).features)


class Query(NamedTuple):
    """Of a search: what is wanted, what is not."""

    texts: tuple[str, ...]
    images: tuple[BytesItem, ...]
    minus: tuple[str, ...]


@dataclass(frozen=True)
class QueryVector:
    """query -> unit vector (D,)."""

    served: Served

    def __call__(self, items: Sequence[Query]) -> list[np.ndarray]:
        return [query_vector(self.served.model, query.texts, query.images, query.minus) for query in items]


class Why(NamedTuple):
    """Of a heat map: an image, and a text or one of the model's classes."""

    pixels: Tensor  # (3, H, W)
    text: str
    is_class: bool


@dataclass(frozen=True)
class Explain:
    """why -> (scores (h, w), score): how much each patch fits the text, and the image's cosine with it.

    The plain cosine of a patch with a text is as high in the background, or even highest there (CLIP Surgery, arXiv
    2304.05653): patches that show little gather what the whole image shows, and any text has much in common with any
    image. So the last block compares queries with queries and keys with keys, and from a patch's cosine with the text
    that with texts that say nothing is subtracted.
    """

    served: Served

    def __call__(self, items: Sequence[Why]) -> list[tuple[Tensor, float]]:
        return [self._map(why) for why in items]

    def _map(self, why: Why) -> tuple[Tensor, float]:
        backbone = self.served.backbone
        if "patches" not in backbone.capabilities:
            raise ClipadaptError(f"{self.served.id} has no patch features, so it cannot explain where it looks.")
        local = backbone.attention("qq+kk") if "attention" in backbone.capabilities else nullcontext()
        pixels = why.pixels[None].to(backbone.device)
        with torch.no_grad():
            whole = backbone.encode_images(pixels)[0].float().cpu()  # (D,)
            with local:
                tokens = backbone.encode_images(pixels, tokens=True)
            patches = tokens.patches[0].float().cpu()  # (h * w, D)
            text = self._text(why).float().cpu()
            nothing = self.served.model.encode_texts(_NOTHING).float().cpu().mean(0)
        return (patches @ (text - nothing)).reshape(tokens.grid), float(whole @ text)

    def _text(self, why: Why) -> Tensor:
        """(D,) unit: the text as it is, or the class as the method's prompts name it."""
        model = self.served.model
        if not why.is_class:
            return model.encode_texts([why.text])[0]
        return model.encode_class(why.text)


# -- loading ----------------------------------------------------------------------------------------------------------


class Models:
    """The models by id, the first of which answers where none is asked for.

    Raises ClipadaptError if two would have the same id, or one cannot be served.
    """

    def __init__(self, folders: Iterable[Path | str] = (), backbone: str | None = None) -> None:
        self._backbones: dict[str, Backbone] = {}  # fingerprint -> backbone, so that models share it
        self._folders: dict[str, Path] = {}
        self._stamps: dict[str, Any] = {}
        self._complaints: dict[str, str] = {}
        self.served: dict[str, Served] = {}
        for folder in folders:
            self.add(folder)
        if backbone is not None or not self.served:
            self.add_backbone(backbone)

    def get(self, name: str | None) -> Served:
        """The model called `name`, or the first one."""
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            raise unknown_name("model", name, self.served)
        return self.served[name]

    def add(self, folder: Path | str) -> Served:
        """Serve the adapted model in `folder` under the folder's name."""
        folder = Path(folder)
        name = folder.resolve().name
        self._refuse_second(name)
        self._folders[name], self._stamps[name] = folder, _stamp(folder)
        self.served[name] = self._load(name)
        return self.served[name]

    def add_backbone(self, source: str | None) -> Served:
        """Serve a backbone as it is, to embed and to search with."""
        backbone = load_backbone(source)
        name = "embedded" if source is None else Path(source).name
        self._refuse_second(name)
        backbone = self._backbones.setdefault(backbone.fingerprint, backbone)
        tower = Tower(backbone.image_fingerprint, backbone.encode_images, backbone.preprocess, backbone.device)
        self.served[name] = Served(name, backbone, backbone.fingerprint, tower, backbone.image_fingerprint)
        return self.served[name]

    def for_embeddings(self, image_fingerprint: str) -> Served | None:
        """The first model whose queries may be compared with embeddings of that fingerprint."""
        return next((s for s in self.served.values() if s.image_fingerprint == image_fingerprint), None)

    async def watch(
        self,
        run: Callable[[Callable[[], Served]], Awaitable[Served]],
        reloaded: Callable[[str], None],
        every: float = 1.0,
    ) -> None:
        """For ever load models anew whose folders change; a damaged one is named in the log, and the old one stays.

        Args:
            run: gives `work()`, run in the model's thread.
            reloaded: called with "ok" or "failed".
            every: seconds between two looks.
        """
        while True:
            await asyncio.sleep(every)
            for name, folder in self._folders.items():
                stamp = await asyncio.to_thread(_stamp, folder)
                if stamp == self._stamps[name]:
                    continue
                try:
                    if await asyncio.to_thread(_revision, folder) != self.served[name].revision:
                        self.served[name] = await run(lambda name=name: self._load(name))  # type: ignore[misc]
                        reloaded("ok")
                        log.info(f"{name} was reloaded.", extra={"fields": {"revision": self.served[name].revision}})
                    self._complaints.pop(name, None)
                except Exception as error:  # whatever is wrong with it, the old one still works
                    if self._complaints.get(name) != str(error):
                        reloaded("failed")
                        log.warning(f"{name} changed but cannot be loaded, so the previous version stays: {error}")
                    self._complaints[name] = str(error)
                self._stamps[name] = stamp

    def _refuse_second(self, name: str) -> None:
        if name in self.served:
            raise ClipadaptError(f"Two models are called {name!r}; rename one of the folders.")

    def _load(self, name: str) -> Served:
        folder = self._folders[name]
        revision = _revision(folder)
        model = load(folder, self._backbone_of(folder))
        if _revision(folder) != revision:
            raise ArtifactError(f"{folder} changed while it was read.")
        if model.backbone_ is None:
            raise ArtifactError(f"{folder} was fitted on features and has no towers, so it cannot encode images.")
        model.probabilities(torch.zeros(1, len(model.class_names_)))  # refuses a multi-label model without a threshold
        return Served(name, model, revision, _tower(model), model.encoder.image_fingerprint)

    def _backbone_of(self, folder: Path) -> Backbone | None:
        origin = origin_of(folder)
        if origin is None:
            return None  # `load` says what is wrong
        if origin["fingerprint"] not in self._backbones:
            backbone = load_backbone(origin["source"])
            self._backbones[backbone.fingerprint] = backbone
            return backbone
        return self._backbones[origin["fingerprint"]]


def _tower(model: Any) -> Tower | None:
    """The image tower whose features the method's classifier takes; None if it looks at the images themselves."""
    encoder = model.encoder
    if model.head is None:
        return None
    return Tower(encoder.image_fingerprint, encoder.encode, model.backbone_.preprocess, encoder.device)


def _stamp(folder: Path) -> Any:
    """Changes whenever a file in the folder does."""
    try:
        files = sorted((entry.name, entry.stat()) for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return None
    return [(name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in files]


def _revision(folder: Path) -> str:
    """SHA-256 of config.json, which names the weights by theirs."""
    try:
        return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    except OSError:
        raise ArtifactError(f"{folder} is not a saved model: it has no config.json.") from None


def as_base64(feature: Tensor) -> str:
    """(D,) as little-endian float32 in base64, as OpenAI's clients expect it."""
    return base64.b64encode(feature.numpy().astype("<f4").tobytes()).decode()
