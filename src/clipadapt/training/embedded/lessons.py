"""Lessons for the text tower: texts, and the direction of the joint space that each is to have.

Things of a dictionary, ImageNet's classes, and all that the corpus calls its images. A folder gets

    texts.json      for each lesson the names it may go by, and an explanation or null
    targets.npy     (N, D) float32, unit
    shares.npy      (N,) float64, how often each is drawn
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div

from clipadapt.data.corpus.pairs import Corpus
from clipadapt.data.corpus.wordnet import Sense, WordNet
from clipadapt.errors import DataError
from clipadapt.files import written_aside
from clipadapt.training.embedded.teacher import SentenceEncoder, TextMap, unit

TEMPLATES = (
    ("{}", 0.3),
    ("a photo of a {}.", 0.4),
    ("a picture of a {}.", 0.1),
    ("a drawing of a {}.", 0.05),
    ("the {}", 0.05),
    ("a {}.", 0.1),
)
EXPLAINED = 0.05  # of the batches are explanations: the longest text of a batch sets its cost
LONGEST, LONG_NAME = 100, 40  # characters of an explanation, and of a name that goes without a template
SHARES = {"things": 0.55, "classes": 0.15, "corpus": 0.30}
SHARPNESS = 20.0  # of the likeness of texts to one another
ABOVE = 0.3  # weight of the explanation of what a thing is a kind of; chosen, like the map, on names held out


@dataclass(frozen=True)
class Lessons:
    """Open lessons; a source of batches (`training.pairs.PairSource`)."""

    names: list[list[str]]
    explained: list[str | None]
    targets: np.ndarray  # (N, D)
    shares: np.ndarray  # (N,)

    @classmethod
    def open(cls, folder: Path) -> Lessons:
        """Raises `DataError` when `folder` holds none."""
        try:
            texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
            return cls(
                texts["names"], texts["explained"], np.load(folder / "targets.npy"), np.load(folder / "shares.npy")
            )
        except OSError:
            raise DataError(f"{folder} holds no lessons; make them with: clipadapt pretrain prepare.") from None

    def save(self, folder: Path) -> None:
        """Write them to `folder`; texts.json comes last."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "targets.npy", self.targets)
        np.save(folder / "shares.npy", self.shares)
        with written_aside(folder / "texts.json") as aside:
            aside.write_text(json.dumps({"names": self.names, "explained": self.explained}, ensure_ascii=False) + "\n")

    def target(self) -> dict[str, np.ndarray]:
        """The direction of each lesson's first name."""
        return {names[0]: row for names, row in zip(self.names, self.targets, strict=True)}

    def batch(self, step: int, batch_size: int, image_size: int, seed: int) -> dict[str, Any]:
        """Texts and their targets of one step."""
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(self.names), batch_size, replace=False, p=self.shares)
        explained = rng.random() < EXPLAINED
        texts = [self._text(row, rng, explained) for row in rows]
        return {"text": texts, "target": self.targets[rows]}

    def _text(self, row: int, rng: np.random.Generator, explained: bool) -> str:
        explanation, names = self.explained[row], self.names[row]
        if explained and explanation is not None:
            return explanation[:LONGEST]
        return templated(names[rng.integers(len(names))], rng)


def templated(name: str, rng: np.random.Generator) -> str:
    """A name in one of TEMPLATES; a long one as it is."""
    templates, shares = zip(*TEMPLATES, strict=True)
    return name if len(name) > LONG_NAME else rng.choice(templates, p=shares).format(name)


def taught(out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The objective: each text close to its target, and as like the batch's other targets as its own target is."""
    text, target = out["text"], out["target"]
    alike = (SHARPNESS * target @ target.T).softmax(1)
    found = (SHARPNESS * text @ target.T).log_softmax(1)
    return {"far": 2 * (1 - (text * target).sum(1).mean()), "unlike": kl_div(found, alike, reduction="batchmean")}


def make_lessons(
    encoder: SentenceEncoder,
    wordnet: WordNet,
    classes: Sequence[str],
    directions: np.ndarray,
    corpus: Corpus,
    *,
    report: Callable[[str], None] = print,
) -> Lessons:
    """What a teacher says of all texts.

    Args:
        classes: the ids of WordNet of the classifier's classes.
        directions: (C, D), their unit directions.
    """
    senses = [wordnet.senses[one] for one in classes]
    things = wordnet.things
    report(f"{len(things):,} things, {len(senses):,} classes")
    features = _Features(encoder)
    everything = {sense.id: sense for sense in (*senses, *things.values())}
    everything |= {one: wordnet.senses[one] for sense in list(everything.values()) for one in sense.above[:1]}
    features.add([text for sense in everything.values() for text in (explanation(sense), sense.gloss)])
    features.add([name for sense in senses for name in sense.names])
    features.add(list(things))

    def described(names: Sequence[str], sense: Sense | None) -> np.ndarray:
        """The unit sentence feature (384,) of a thing, of its names and of what the dictionary says of it."""
        own = unit(features.mean(names))
        if sense is None:
            return own
        whole = own + unit(features.mean([explanation(sense), sense.gloss]))
        above = [explanation(wordnet.senses[one]) for one in sense.above[:1]]
        return unit(whole + ABOVE * features.mean(above)) if above else unit(whole)

    teacher = TextMap(np.stack([described(sense.names, sense) for sense in senses]), directions)
    names, explained, targets, shares = [], [], [], []

    def lesson(of: list[str], sense: Sense | None, target: np.ndarray, share: float) -> None:
        names.append(of)
        explained.append(explanation(sense) if sense else None)
        targets.append(target)
        shares.append(share)

    counts = wordnet.frequency
    mapped = teacher(np.stack([described([name], sense) for name, sense in things.items()]))
    weights = np.array([1 + np.log1p(counts[name]) for name in things])
    for (name, thing), target, share in zip(things.items(), mapped, weights / weights.sum(), strict=True):
        lesson([name], thing, target, SHARES["things"] * share)
    for sense, direction in zip(senses, directions, strict=True):
        lesson(list(sense.names), sense, direction, SHARES["classes"] / len(senses))
    called = corpus_names(corpus)
    report(f"{len(called):,} names of the corpus")
    features.add([text for texts in called.values() for text in texts])
    known = [things.get(name) for name in called]
    mapped = teacher(np.stack([described(texts, sense) for texts, sense in zip(called.values(), known, strict=True)]))
    for texts, meant, target in zip(called.values(), known, mapped, strict=True):
        lesson(texts, meant, target, SHARES["corpus"] / len(called))
    return Lessons(names, explained, np.stack(targets).astype(np.float32), np.array(shares) / np.sum(shares))


def corpus_names(corpus: Corpus) -> dict[str, list[str]]:
    """What training images are called: each name with all English texts of it; of scenes, their shortest captions."""
    called: dict[str, dict[str, None]] = {}
    for index in corpus.select("train"):
        pair = corpus.pairs[index]
        texts = [min(pair["texts"], key=len)] if pair["kind"] == "playground" else [pair["name"], *pair["texts"]]
        called.setdefault(texts[0], {}).update(dict.fromkeys(texts))
    return {name: list(texts) for name, texts in called.items()}


def explanation(sense: Sense) -> str:
    """What the dictionary says, as one text."""
    return f"{sense.names[0]}: {sense.gloss}"


class _Features:
    """Sentence features of texts, each encoded once."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, np.ndarray] = {}

    def add(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= dict(zip(new, self._encoder(new), strict=True))

    def mean(self, texts: Sequence[str]) -> np.ndarray:
        return np.mean([self._known[text] for text in texts], axis=0)
