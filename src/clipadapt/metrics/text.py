"""How good are generated texts."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(references: Sequence[Sequence[str]], predicted: Sequence[str]) -> float:
    """The share in [0, 1] of texts that equal one of their references, ignoring case and surrounding spaces.

    Raises:
        ValueError: there are no texts, or not as many as lists of references.
    """
    if not len(predicted) or len(references) != len(predicted):
        raise ValueError(f"one list of references for each text is needed, not {len(references)} for {len(predicted)}")
    plain = [{text.strip().casefold() for text in own} for own in references]
    return sum(text.strip().casefold() in own for text, own in zip(predicted, plain, strict=True)) / len(predicted)
