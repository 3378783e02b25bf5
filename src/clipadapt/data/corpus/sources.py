"""Where the pretraining images come from: named icon sets, CLDR annotations, Debian's clip art.

Every source yields `Record`s: one image that is not drawn yet, and what it may be called. Nothing here is random and
nothing is drawn, so that the list of records is the same on every machine for the pinned versions (see `packages`).
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

HELDOUT_SETS = ("fluent-emoji-flat",)  # the emoji style that is kept for evaluation
LEFT_OUT_SETS = ("fluent-emoji-high-contrast",)  # the held-out style's own outlines
MONOCHROME_SETS = ("game-icons", "healthicons", "pinhead", "fa7-solid")  # concrete things; drawn in random colours
LEFT_OUT_CATEGORIES = ("Logos", "Programming")  # brands: trademarks, and names that say nothing about the image
# SPDX names; no share-alike, no non-commercial, no copyleft.
LICENCES = (
    *("MIT", "Apache-2.0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Unlicense"),
    *("CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1"),
)
OTHER_LANGUAGES = ("es", "fr", "de", "it", "pt")

# Words at the end of an icon's name that tell its style or version, not its subject.
STYLE_WORDS = (
    *("flat", "duo", "duotone", "fill", "filled", "outline", "outlined", "line", "solid"),
    *("color", "colored", "1x1", "4x3", "alt", "variant", "icon", "icons"),
)
# Folders of the clip art that hold geometry for its own sake (hundreds of near-identical stars, blends, swatches).
LEFT_OUT_FOLDERS = ("shapes/stars", "special", "unsorted/duplicates", "computer/icons/flat-theme/action", "logos")
TELLING_FOLDERS = ("animals", "food", "plants", "people/clothing", "recreation/toys")  # their names name each image


@dataclass
class Record:
    """An image to draw (`svg` markup or an image `file`), its canonical name and the other things it may be called."""

    source: str
    name: str
    kind: str  # "emoji" | "icon" | "clipart"
    texts: list[str]  # English; texts[0] == name
    keywords: list[str] = field(default_factory=list)  # English, loosely related
    other: list[str] = field(default_factory=list)  # the name in other languages
    svg: str | None = None
    file: Path | None = None

    @property
    def split(self) -> str:
        if is_heldout_name(self.name):
            return "heldout-name"
        return "heldout-style" if self.source in HELDOUT_SETS else "train"


def is_heldout_name(name: str) -> bool:
    """A tenth of all names, chosen by a hash, in every source alike; "cat" and "cat face" fall together."""
    concept = name.removesuffix(" face")
    return int.from_bytes(blake2b(concept.encode(), digest_size=4).digest(), "big") % 10 == 0


def clean_name(name: str) -> str:
    """An identifier as words: "apple-core_02" -> "apple core", "camera-24-filled" -> "camera"."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    parts = [word for word in re.split(r"[\s_.\-]+", words) if word]
    while len(parts) > 1 and (parts[-1] in STYLE_WORDS or re.fullmatch(r"[a-z]?\d+(px|[a-z])?", parts[-1])):
        parts.pop()
    return " ".join(parts)


@dataclass
class _Emoji:
    name: str
    texts: list[str]
    keywords: list[str]
    other: list[str]


class Annotations:
    """CLDR's names and keywords of emoji, by code points ("1f34e", "1f468-200d-1f3a8") or by name."""

    def __init__(self, archives: list[Path]):
        tables: dict[str, dict[str, Any]] = {language: {} for language in ("en", *OTHER_LANGUAGES)}
        for archive in archives:
            with tarfile.open(archive) as tar:
                for member in tar:
                    match = re.fullmatch(r"package/(annotations\w*)/(\w+)/annotations\.json", member.name)
                    if match and match[2] in tables:
                        document = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                        tables[match[2]] |= document[match[1]]["annotations"]
        self._tables = tables
        self._english = {_codes(text): text for text in tables["en"]}
        self._by_name = {
            _squash(entry["tts"][0]): _codes(text) for text, entry in tables["en"].items() if "tts" in entry
        }

    def __contains__(self, codes: str) -> bool:
        return codes in self._english

    def by_name(self, name: str) -> str | None:
        """The code points of the emoji with this name, ignoring spaces: "carouselhorse", "carousel horse"."""
        return self._by_name.get(_squash(name))

    def words(self) -> set[str]:
        entries = self._tables["en"].values()
        texts = (text for entry in entries for text in (*entry.get("tts", ()), *entry.get("default", ())))
        return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}

    def describe(self, codes: str) -> _Emoji:
        text = self._english[codes]
        entry = self._tables["en"][text]
        name, toned = _spoken(entry["tts"][0])
        keywords = [word.lower() for word in entry.get("default", ()) if "skin tone" not in word]
        texts = [name, *([toned] if toned != name else [])]
        if name.endswith(" face") and name.removesuffix(" face") in keywords:
            texts.append(name.removesuffix(" face"))  # "cat face" is also called "cat"
        other = []
        for language in OTHER_LANGUAGES:
            spoken = self._tables[language].get(text, {}).get("tts", [":"])[0].lower()
            if ":" not in spoken:  # a colon sets off skin tones and the like, in words we cannot tell apart
                other.append(spoken)
        return _Emoji(name, texts, [word for word in keywords if word not in texts], other)


def _codes(text: str) -> str:
    return "-".join(f"{ord(char):x}" for char in text if char != "\ufe0f")


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _spoken(tts: str) -> tuple[str, str]:
    """CLDR's "waving hand: light skin tone" -> ("waving hand", "waving hand, light skin tone")."""
    head, _, rest = tts.lower().partition(": ")
    if head == "flag":
        return f"flag of {rest}", f"flag of {rest}"
    features = [part for part in rest.split(", ") if part]
    plain = [part for part in features if "skin tone" not in part]
    name = ", ".join([head, *plain]) if head != "keycap" else f"keycap {rest}"
    return name, ", ".join([head, *features]) if head != "keycap" else name


def icon_records(archive: Path, annotations: Annotations) -> Iterator[Record]:
    """Records of every chosen icon set, and of the held-out emoji style."""
    with tarfile.open(archive) as tar:
        members = {
            Path(member.name).stem: member
            for member in tar
            if re.fullmatch(r"package/(json/)?[^/]+\.json", member.name)
        }
        infos = json.load(tar.extractfile(members["collections"]))  # type: ignore[arg-type]
        sets = {
            prefix: json.load(tar.extractfile(members[prefix]))  # type: ignore[arg-type]
            for prefix, info in sorted(infos.items())
            if is_chosen(prefix, info)
        }
    # Emoji styles share names: what one set says about code points helps the others.
    named_codes = {
        name: codes.replace("-fe0f", "")
        for icons in sets.values()
        for codes, name in icons.get("chars", {}).items()
        if codes.replace("-fe0f", "") in annotations
    }
    for prefix, icons in sets.items():
        is_emoji = "emoji" in prefix or infos[prefix].get("category") == "Emoji"
        is_flags = infos[prefix].get("category") == "Flags / Maps" and prefix not in MONOCHROME_SETS
        aliases: dict[str, list[str]] = {}
        for alias, target in icons.get("aliases", {}).items():
            if set(target) == {"parent"}:
                aliases.setdefault(target["parent"], []).append(alias)
        for name, icon in sorted(icons["icons"].items()):
            if icon.get("hidden"):
                continue
            record = Record(prefix, "", "emoji" if is_emoji else "icon", [], svg=_svg(icon, icons))
            codes: str | None = None
            if is_emoji:
                bare = re.sub(r"-\d$", "", name)
                codes = named_codes.get(name) or annotations.by_name(name) or named_codes.get(bare)
                codes = codes or annotations.by_name(bare)
            elif is_flags and (country := re.match(r"[a-z]{2}(?=$|-\dx\d$)", name)):
                codes = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in country[0])
            if codes is not None and codes in annotations:
                emoji = annotations.describe(codes)
                own = [clean_name(alias) for alias in (name, *aliases.get(name, ()))] if is_emoji else []
                texts = [text for text in own if "skin tone" not in text and not _toned(text)]
                record.name, record.texts = emoji.name, list(dict.fromkeys([*emoji.texts, *texts]))
                record.keywords, record.other = emoji.keywords, emoji.other
            elif is_emoji or is_flags:
                continue  # a name that is not in general use says nothing ("e50a", "lang-qu")
            else:
                texts = [clean_name(text) for text in (name, *aliases.get(name, ()))]
                record.name, record.texts = texts[0], list(dict.fromkeys(texts))
                if not re.search(r"[a-z]{3}", record.name) or record.name.startswith("abstract"):
                    continue
            yield record


def _toned(text: str) -> bool:
    return bool(re.search(r" (light|medium|dark|medium light|medium dark)$", text))


def is_chosen(prefix: str, info: dict[str, Any]) -> bool:
    """Colour sets and the few monochrome ones, under a permissive licence, no brands."""
    if prefix in LEFT_OUT_SETS or info["license"].get("spdx") not in LICENCES:
        return False
    return prefix in MONOCHROME_SETS or (bool(info.get("palette")) and info.get("category") not in LEFT_OUT_CATEGORIES)


def set_facts(archive: Path) -> dict[str, dict[str, str]]:
    """Title, author, licence and address of each chosen set, for corpus.json."""
    with tarfile.open(archive) as tar:
        infos = json.load(tar.extractfile("package/collections.json"))  # type: ignore[arg-type]
    return {
        prefix: {
            "title": info["name"],
            "author": info["author"]["name"],
            "licence": info["license"]["spdx"],
            "url": info["author"].get("url", ""),
        }
        for prefix, info in sorted(infos.items())
        if is_chosen(prefix, info)
    }


def _svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def clipart_records(unpacked: Path, known_words: set[str]) -> Iterator[Record]:
    """Records of Debian's openclipart-png, `unpacked`.

    File names end in authors' names ("sombrero_dave_pena_01"): words are read up to the first that `known_words` lacks.
    The folder ("hats") is a keyword, and the name where nothing is left.
    """
    root = unpacked / "usr/share/openclipart/png"
    for file in sorted(root.rglob("*.png")):
        folder = file.parent.relative_to(root).as_posix()
        if folder.startswith(LEFT_OUT_FOLDERS):
            continue
        words: list[str] = []
        topic = clean_name(file.parent.name)
        for word in clean_name(file.stem).split():
            if word not in known_words or len(word) < 2:
                break
            words.append(word)
        if not words and not folder.startswith(TELLING_FOLDERS):
            continue
        name = " ".join(words) or topic
        if folder.startswith("signs_and_symbols/flags") and words:
            name = f"flag of {name.removeprefix('flag ').removeprefix('of ')}"
        yield Record("openclipart", name, "clipart", [name], [] if name == topic else [topic], file=file)


def known_words(records: list[Record], annotations: Annotations) -> set[str]:
    """English words that CLDR uses, or that at least two icon sets have in names."""
    uses: Counter[str] = Counter()
    for source in {record.source for record in records}:
        uses.update({word for record in records if record.source == source for word in record.name.split()})
    return annotations.words() | {word for word, count in uses.items() if count > 1}
