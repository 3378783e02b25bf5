"""Write docs/methods.md, the catalogue of all methods, from their cards.

    python docs/make_catalogue.py [FILE]

Run it after adding or changing a method; a test compares the page with what this gives.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from clipadapt.cli.methods import SIGNALS, entry, value_range, value_text
from clipadapt.methods import list_methods

HEAD = """\
# The methods

<!-- Written by `python docs/make_catalogue.py` from the methods' cards; change those, not this page. -->

Each method is one published way to adapt a CLIP-like model. `clipadapt methods` prints this list, and
`clipadapt methods KEY` one entry. [Using the library from Python](python.md) shows how a method is run, and
[Which method?](choosing.md) how `--method auto` decides.

*Learns from* says what `fit` needs: class names alone, or labelled images. *Needs* names the
[capabilities](backbones.md#capabilities) without which a method refuses a backbone. *Answers as* is the task of a
fitted method and the kind of learning, see [How the library is built](design.md#methods).

Every method also takes `templates` (default `photo`): the sentences made of the class names, see
[Templates](images.md#templates).
"""

# What a card may say in addition, in words.
ABILITIES = {
    "new_classes": "classes that it has not learned, by their names",
    "multi_label": "several labels an image",
    "unlabelled": "unlabelled images",
    "streams": "streams of tasks",
}


def catalogue() -> str:
    """The page."""
    cards = sorted(map(entry, list_methods()), key=lambda card: (card["family"], card["key"]))
    families = {name: list(members) for name, members in groupby(cards, key=lambda card: card["family"])}
    overview = ["| family | methods |", "|---|---|"]
    for name, members in families.items():
        links = ", ".join(f"[{card['key']}](#{card['key'].replace('+', '')})" for card in members)
        overview.append(f"| {name} | {links} |")
    sections = [f"## {name}\n\n" + "\n\n".join(map(section, members)) for name, members in families.items()]
    return "\n".join([HEAD, *overview]) + "\n\n" + "\n\n".join(sections) + "\n"


def section(card: dict[str, Any]) -> str:
    """A method's entry: what it is, its facts, its hyper-parameters."""
    paper = f"*{card['title']}*"
    if card["arxiv"]:
        paper += f", [arXiv {card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})"
    needs = ", ".join(f"`{name}`" for name in card["requires"]) or "nothing in particular"
    lines = [
        f"### {card['key']}\n",
        f"{card['summary']}\n",
        f"- Paper: {paper}",
        f"- Problem: {card['problem']}",
        f"- Answers as: {card['task']}, kind: {card['kind']}",
        f"- Trains: {card['trains'] or 'nothing'}",
        f"- Learns from: {SIGNALS.get(card['signal'], card['signal'])}",
        f"- Needs: {needs}",
    ]
    if more := [words for fact, words in ABILITIES.items() if card[fact]]:
        lines.append(f"- Also takes: {', '.join(more)}")
    own = [p for p in card["hyperparameters"] if p["name"] != "templates"]
    if own:
        lines += ["", "| hyper-parameter | default | values | meaning |", "|---|---|---|---|"]
        lines += [row(parameter) for parameter in own]
    return "\n".join(lines)


def row(parameter: dict[str, Any]) -> str:
    """A hyper-parameter as a row of the table."""
    default = "–" if parameter["default"] is None else f"`{value_text(parameter['default'])}`"
    cells = [f"`{parameter['name']}`", default, value_range(parameter), parameter["doc"]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("methods.md")
    target.write_text(catalogue(), encoding="utf-8")
