"""Who does what to whom in a caption, by a few rules of English, enough for captions such as "a dog on a red sofa"."""

from __future__ import annotations

import re
from typing import NamedTuple


class Parts(NamedTuple):
    """What a caption says; without a predicate it lists two things."""

    subject: str
    predicate: str | None
    object: str


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_DETERMINERS = _set("a an the this that these those some his her its their my your our")
_ADJECTIVES = _set("""
    red orange yellow green blue purple pink brown black white grey gray golden silver small large big little tiny huge
    tall short long young old new plain striped spotted dotted checkered wooden metal one two three four five""")
# Words that link two things; verbs that end in -ing are links without being listed.
_LINKS = _set("""
    above across against along among around at atop before behind below beneath beside besides between beyond by down
    during from in inside into like near off on onto opposite out outside over past through to toward towards under
    underneath up upon with within without next is are was were be being has have had wears wear holds hold rides ride
    eats eat sits sit stands stand chases chase carries carry plays play uses use watches hits hit kicks kick throws
    throw catches catch pulls pull pushes push touches touch feeds feed bites bite kisses kiss hugs hug follows follow
    jumps jump lies lie looks covers crosses drives reads read makes faces leans""")
_NO_VERBS = _set("""
    awning building ceiling clothing dressing duckling earring evening frosting icing king landing lightning morning
    opening painting pudding railing ring seedling sibling sing spring sting string swing thing topping wedding wing""")
_PHRASES = re.compile(
    r"(?:(?:to |on |at )?the (?:left|right|side|top|bottom|front|back) of|left of|right of|on top of|in front of|"
    r"in the middle of|close to|far from|next to|away from)\b"
)
_INTRODUCTION = re.compile(r"(?:an?|the) (?:photo|picture|image|drawing|painting|sketch) of ")


def parse(caption: str) -> Parts | None:
    """The first two things of a caption and the words between them, by rules; None if there are not two.

    A thing is what comes before or after a link, without its article; adjectives alone do not count. A link is the
    longest row of words that are prepositions, common verbs, words that end in -ing, or a phrase such as "to the left
    of"; the first word is never in one. "and" or a comma between two things links them without a predicate. What
    follows the second thing is not looked at, nor is "a photo of" in front.

    >>> parse("a young man riding a brown horse in a field")
    Parts(subject='young man', predicate='riding', object='brown horse')
    """
    text = " ".join(re.sub(r"[.!?;:\"]", " ", caption.lower()).replace(",", " , ").split())
    words = _INTRODUCTION.sub("", text, count=1).split() if _INTRODUCTION.match(text) else text.split()
    subject, place = _thing(words, 0)
    start = place
    if words[place : place + 1] in (["and"], [","]):
        start = place = place + 1
    else:
        while length := _link(words, place):
            place += length
    predicate = " ".join(words[start:place])
    object_, _ = _thing(words, place)
    return Parts(subject, predicate or None, object_) if subject and object_ else None


def _thing(words: list[str], place: int) -> tuple[str, int]:
    """The thing named from `place` on, up to a link, "and" or a comma, and the place of what ends it."""
    named: list[str] = []
    while place < len(words) and not (
        not _ADJECTIVES.issuperset(named) and (words[place] in ("and", ",") or _link(words, place))
    ):
        if named or words[place] not in _DETERMINERS:
            named.append(words[place])
        place += 1
    return " ".join(named), place


def _link(words: list[str], place: int) -> int:
    """How many words from `place` on link two things: 0 for none."""
    if place >= len(words):
        return 0
    if phrase := _PHRASES.match(" ".join(words[place:])):
        return len(phrase[0].split())
    word = words[place]
    return int(word in _LINKS or (len(word) > 4 and word.endswith("ing") and word not in _NO_VERBS))
