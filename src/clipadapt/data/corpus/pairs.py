"""The pretraining corpus: named images of many styles in one folder, and training batches drawn from it.

    corpus.json   what it was built from: versions, licences, authors, counts
    images.npy    (N, 128, 128, 4) uint8, straight RGBA, memory-mapped
    pairs.jsonl   one line per image: source, name, texts, keywords, other, split, kind

Kept out of training, and for evaluation only: one emoji style ("heldout-style"), a tenth of all names in every source
and a tenth of the playground's kinds ("heldout-name"), and one playground style ("heldout-style").
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import cpu_count
from PIL import Image

from clipadapt.data.corpus.packages import CLIP_ART, NPM, from_debian, from_npm, unpack
from clipadapt.data.corpus.sources import (
    Annotations,
    Record,
    clipart_records,
    icon_records,
    known_words,
    set_facts,
)
from clipadapt.errors import DataError
from clipadapt.files import written_aside

if TYPE_CHECKING:
    import torch

SIZE = 128  # pixels a side
MAX_PIXELS = 16_000_000  # larger clip art is left out: it takes seconds each
KIND_WEIGHTS = {"emoji": 0.6, "icon": 0.1, "clipart": 0.05, "playground": 0.25}  # shares of a training batch

# (template, weight). The plain default of zero-shot classification is common, so that it works well untuned.
TEMPLATES = (
    ("{}", 0.35),
    ("a photo of a {}.", 0.30),
    ("a picture of a {}.", 0.06),
    ("an icon of a {}.", 0.06),
    ("a drawing of a {}.", 0.06),
    ("clip art of a {}.", 0.03),
    ("an emoji of a {}.", 0.04),
    ("this is a {}.", 0.04),
    ("a {}.", 0.06),
)
LONG_TEXT = 44  # characters; longer texts go without a template: the longest text of a batch sets its cost
CAPTION_TEMPLATES = (
    ("{}", 0.5),
    ("{}.", 0.1),
    ("a photo of {}.", 0.25),
    ("a picture of {}.", 0.1),
    ("a drawing of {}.", 0.05),
)


def build_corpus(
    out: str | Path,
    *,
    archives: str | Path | None = None,
    playground: int = 22_000,
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Builds the corpus in the folder `out` and returns it.

    `archives` holds the packages that were fetched before (missing ones are fetched into it; default `out`/archives).
    `playground` is the number of its images to draw. Drawing takes some ten minutes on two cores.
    """
    out = Path(out)
    folder = Path(archives) if archives else out / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    iconify, *cldr = (from_npm(package, folder) for package in NPM)
    annotations = Annotations(cldr)
    records = list(icon_records(iconify, annotations))
    clip_art = from_debian(CLIP_ART, folder)
    if clip_art is None:
        report(f"{CLIP_ART} is left out: apt-get and dpkg-deb are not both installed.")
    else:
        words = known_words(records, annotations)
        records += clipart_records(unpack(clip_art, folder / CLIP_ART), words)
    facts: dict[str, Any] = {
        "packages": {**NPM, **({CLIP_ART: clip_art.name} if clip_art else {})},
        "sources": set_facts(iconify)
        | {"cldr": {"title": "Unicode CLDR annotations", "author": "Unicode, Inc.", "licence": "Unicode-3.0"}}
        | {"openclipart": {"title": "Open Clip Art Library", "author": "many", "licence": "public domain"}}
        | {"playground": {"title": "clipadapt's playground", "author": "clipadapt", "licence": "Apache-2.0"}},
    }
    return write_corpus(out, records, facts, playground=playground, workers=workers, report=report)


def write_corpus(
    out: str | Path,
    records: Sequence[Record],
    facts: dict[str, Any],
    *,
    playground: int,
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Draws `records` and `playground` scenes into `out`; images that cannot be drawn are counted and left out."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(
        out / "images.npy.part", "w+", dtype=np.uint8, shape=(len(records) + playground, SIZE, SIZE, 4)
    )
    lines: list[dict[str, Any]] = []
    failed: Counter[str] = Counter()
    with ProcessPoolExecutor(workers or cpu_count()) as pool:
        drawn: Iterator[bytes | None] = pool.map(draw_record, records, chunksize=64)
        for record, pixels in zip(records, drawn, strict=True):
            if pixels is None:
                failed[record.source] += 1
                continue
            images[len(lines)] = np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 4)
            lines.append(_line(record))
            if len(lines) % 10_000 == 0:
                report(f"{len(lines):,} images drawn")
        scenes: Iterator[tuple[bytes, dict[str, Any]]] = pool.map(draw_scene, range(playground), chunksize=64)
        for pixels, line in scenes:
            images[len(lines)] = np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 4)
            lines.append(line)
    with written_aside(out / "images.npy") as aside, aside.open("wb") as file:
        np.save(file, images[: len(lines)])
    del images
    (out / "images.npy.part").unlink()
    with written_aside(out / "pairs.jsonl") as aside, aside.open("w", encoding="utf-8") as pairs:
        pairs.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    counts = Counter(line["source"] for line in lines)
    facts["sources"] = {source: fact | {"pictures": counts[source]} for source, fact in facts["sources"].items()}
    splits = Counter(line["split"] for line in lines)
    facts |= {"pictures": len(lines), "splits": dict(splits), "not_drawn": dict(failed)}
    with written_aside(out / "corpus.json") as aside:
        aside.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report(f"{len(lines):,} images in {out}, {sum(failed.values()):,} could not be drawn")
    return out


def _line(record: Record) -> dict[str, Any]:
    fields = ("source", "name", "texts", "keywords", "other", "split", "kind")
    return {name: getattr(record, name) for name in fields}


def draw_record(record: Record) -> bytes | None:
    """The record's image, (128, 128, 4) straight RGBA bytes, longest side 128, centred; None if it cannot be drawn."""
    image: Image.Image
    try:
        if record.svg is not None:
            import resvg_py

            # Monochrome icons get one colour each, by their name.
            digest = blake2b(f"{record.source}/{record.name}".encode(), digest_size=3).digest()
            colour = "#" + "".join(f"{value * 3 // 4:02x}" for value in digest)
            svg = record.svg.replace("currentColor", colour)
            image = Image.open(BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE))))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(record.file)  # type: ignore[arg-type]
            if image.width * image.height > MAX_PIXELS:
                return None
        image = image.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image = image.convert("RGBa")  # premultiplied, so that shrinking does not bleed the colour of clear pixels
    image.thumbnail((SIZE, SIZE), Image.Resampling.BOX if record.svg else Image.Resampling.LANCZOS)
    image = image.convert("RGBA")
    if not image.getchannel("A").getbbox():
        return None
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.tobytes()


def draw_scene(index: int) -> tuple[bytes, dict[str, Any]]:
    """A playground image and its line of pairs.jsonl."""
    from clipadapt.data.playground.drawing import HELDOUT_KINDS, HELDOUT_STYLE, Playground

    scene = Playground(size=SIZE, seed=0).scene(index)
    if any(thing.kind in HELDOUT_KINDS for thing in scene.objects):
        split = "heldout-name"
    else:
        split = "heldout-style" if scene.style == HELDOUT_STYLE else "train"
    line = {
        "source": "playground",
        "name": max(scene.captions, key=len),  # the one that says most
        "texts": scene.captions,
        "keywords": [],
        "other": [],
        "split": split,
        "kind": "playground",
    }
    return scene.image.convert("RGBA").tobytes(), line


@dataclass(frozen=True)
class Corpus:
    """A corpus folder, open for reading. Build one with `build_corpus`."""

    folder: Path
    images: np.ndarray  # (N, 128, 128, 4) uint8 straight RGBA
    pairs: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Raises `DataError` when `folder` holds no whole corpus."""
        folder = Path(folder)
        missing = [name for name in ("corpus.json", "images.npy", "pairs.jsonl") if not (folder / name).exists()]
        if missing:
            raise DataError(f"{folder} holds no {missing[0]}; build it with: clipadapt pretrain corpus {folder}")
        with open(folder / "pairs.jsonl", encoding="utf-8") as file:
            pairs = [json.loads(line) for line in file]
        images = np.load(folder / "images.npy", mmap_mode="r")
        if len(images) != len(pairs):
            raise DataError(f"{folder} holds {len(images)} images but {len(pairs)} lines of text; build it again.")
        return cls(folder, images, pairs)

    def select(self, split: str, kind: str | None = None, source: str | None = None) -> list[int]:
        """Indices of the images of one split, and of one kind or source if given."""
        return [
            index
            for index, pair in enumerate(self.pairs)
            if pair["split"] == split and kind in (None, pair["kind"]) and source in (None, pair["source"])
        ]

    def training_texts(self) -> list[str]:
        """Every text of the training images with its repetitions: what the tokenizer is trained on."""
        return [
            text
            for pair in self.pairs
            if pair["split"] == "train"
            for text in (*pair["texts"], *pair["keywords"], *pair["other"])
        ]

    @cached_property
    def _names(self) -> dict[str, list[list[int]]]:
        """Per kind, the training images of each name."""
        groups: dict[str, dict[str, list[int]]] = {kind: {} for kind in KIND_WEIGHTS}
        for index in self.select("train"):
            pair = self.pairs[index]
            groups[pair["kind"]].setdefault(pair["name"], []).append(index)
        return {kind: list(names.values()) for kind, names in groups.items() if names}

    def batch(self, step: int, batch_size: int, image_size: int, seed: int) -> tuple[torch.Tensor, list[str]]:
        """Training batch number `step`: pixels (B, 3, S, S) uint8 and one text each; depends on (step, seed) only.

        Names are drawn first, then one image of each: no two images of a batch have the same name or text, and a
        name that many styles draw is not seen more often. Only the training split is ever drawn from.
        """
        rng = np.random.default_rng([seed, step])
        indices, texts = self.draw_pairs(batch_size, rng)
        read = {index: self.images[index] for index in sorted(indices)}  # the disk in order
        rgba = np.stack([read[index] for index in indices])
        is_scene = np.array([self.pairs[index]["kind"] == "playground" for index in indices])
        return augment(rgba, is_scene, image_size, rng), texts

    def draw_pairs(self, batch_size: int, rng: np.random.Generator) -> tuple[list[int], list[str]]:
        """Images of the training split and a text of each, as `batch` draws them."""
        indices: list[int] = []
        texts: list[str] = []
        used: set[str] = set()  # names and texts
        for index in self._candidates(batch_size, rng):
            name, text = self.pairs[index]["name"], _draw_text(self.pairs[index], rng)
            if text in used:
                text = name
            if name in used:
                continue
            used |= {name, text}
            indices.append(index)
            texts.append(text)
            if len(indices) == batch_size:
                return indices, texts
        raise DataError(f"The corpus has only {len(indices)} training names; a batch of {batch_size} needs as many.")

    def _candidates(self, batch_size: int, rng: np.random.Generator) -> Iterator[int]:
        """Images of a batch with the shares of KIND_WEIGHTS, in random order; then, for those refused, any others."""
        total = sum(KIND_WEIGHTS[kind] for kind in self._names)
        drawn: list[int] = []
        for kind, names in self._names.items():
            wanted = round(batch_size * KIND_WEIGHTS[kind] / total) + 1
            chosen = rng.choice(len(names), min(wanted, len(names)), replace=False)
            drawn += [names[name][rng.integers(len(names[name]))] for name in chosen]
        yield from rng.permutation(drawn).tolist()
        others = [group for names in self._names.values() for group in names]
        for position in rng.permutation(len(others)):
            yield others[position][0]

    def views(self, indices: Sequence[int], image_size: int) -> torch.Tensor:
        """The whole images on white, as they are judged: (B, 3, S, S) uint8."""
        import torch
        from torch.nn.functional import interpolate

        rgba = torch.from_numpy(np.stack([self.images[index] for index in indices])).permute(0, 3, 1, 2).float()
        alpha = rgba[:, 3:] / 255  # (B, 1, 128, 128)
        rgb = rgba[:, :3] * alpha + 255 * (1 - alpha)
        rgb = interpolate(rgb, size=(image_size, image_size), mode="bicubic", antialias=True)
        return rgb.round().clamp(0, 255).to(torch.uint8)


def _draw_text(pair: dict[str, Any], rng: np.random.Generator) -> str:
    """A text of the image in a template: mostly its name, at times a synonym, a keyword or another language; of a
    scene, any of its captions, half of the time the shortest."""
    templates = CAPTION_TEMPLATES if pair["kind"] == "playground" else TEMPLATES
    text = pair["name"]
    share = rng.random()
    if pair["kind"] == "playground":
        # The shortest names things without their colours, which alone would tell most scenes of a batch apart.
        captions = pair["texts"]
        text = min(captions, key=len) if share < 0.5 else captions[rng.integers(len(captions))]
    elif share < 0.3 and len(pair["texts"]) > 1:
        text = pair["texts"][rng.integers(1, len(pair["texts"]))]
    elif 0.3 <= share < 0.36 and pair["keywords"]:
        text = pair["keywords"][rng.integers(len(pair["keywords"]))]
    elif 0.36 <= share < 0.40 and pair["other"]:
        return pair["other"][rng.integers(len(pair["other"]))]
    if len(text) > LONG_TEXT:
        return text
    weights = np.array([weight for _, weight in templates])
    template = templates[rng.choice(len(templates), p=weights / weights.sum())][0]
    return template.format(text)


def augment(rgba: np.ndarray, is_scene: np.ndarray, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Random training views of straight RGBA images (B, H, W, 4), as (B, 3, size, size) uint8.

    Scale, shift and a small rotation (no mirroring: arrows, text and "left of" have a direction; scenes, whose captions
    tell sizes and places, move less); a random plain or shaded background; brightness, contrast and saturation; some
    blur, noise and grey.
    """
    import torch
    from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

    count = len(rgba)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, *shape)).astype(np.float32))

    pixels = torch.from_numpy(rgba).permute(0, 3, 1, 2).float().div_(255)  # (B, 4, H, W)
    pixels[:, :3] *= pixels[:, 3:]
    calm = torch.from_numpy(np.where(is_scene, 0.3, 1.0).astype(np.float32))
    extent = torch.exp(uniform(-0.35, 0.1) * calm)  # side of the image, in sides of the view
    angle = uniform(-0.17, 0.17) * calm  # radians
    slack = (1 - extent).abs() + 0.08
    shift = uniform(-1, 1, 2) * slack[:, None]
    cos, sin = torch.cos(angle) / extent, torch.sin(angle) / extent
    theta = torch.stack([torch.stack([cos, sin, shift[:, 0]], -1), torch.stack([-sin, cos, shift[:, 1]], -1)], 1)
    grid = affine_grid(theta, [count, 4, size, size], align_corners=False)
    pixels = grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B, 4, S, S)

    # Backgrounds: half of them white or nearly so, else any colour; a third are shaded between four corner colours.
    base = torch.where(uniform(0, 1, 1) < 0.5, 1 - uniform(0, 0.04, 1), uniform(0, 1, 3))  # (B, 3)
    corners = base[:, :, None, None] + uniform(-0.35, 0.35, 3, 2, 2) * (uniform(0, 1, 1, 1, 1) < 0.33)
    background = interpolate(corners, size=(size, size), mode="bilinear", align_corners=True)
    rgb = pixels[:, :3] + (1 - pixels[:, 3:]) * background.clamp(0, 1)

    grey = rgb.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1, 1, 1, 1) < 0.03, 0.0, uniform(0.7, 1.2, 1, 1, 1))
    rgb = grey + (rgb - grey) * saturation
    rgb = (rgb - 0.5) * uniform(0.75, 1.15, 1, 1, 1) + 0.5 + uniform(-0.08, 0.08, 1, 1, 1)
    blurred = rng.permutation(count)[: count // 10]
    rgb[blurred] = avg_pool2d(rgb[blurred], 3, stride=1, padding=1, count_include_pad=False)
    noisy = rng.permutation(count)[: count // 10]
    rgb[noisy] += torch.from_numpy(rng.normal(0, 0.05, (len(noisy), 3, size, size)).astype(np.float32))
    return rgb.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
