"""Text generation: captions and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from clipadapt.data import Item, as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Method
from clipadapt.metrics.text import exact_match


class TextGenerator(Method):
    """Answers with one text for each item: write `_text(item)`."""

    task: ClassVar[str] = "text-generator"

    def _text(self, item: Item) -> str:
        """The text of one item."""
        raise NotImplementedError

    def predict(self, items: Any) -> list[str]:
        """One text for each item, such as an image (paths, PIL, a data set)."""
        self._model("it has no towers to look at images with")
        return [self._text(item) for item in as_items(items)]

    def score(self, data: Any) -> float:
        """How good its texts are, by the measure that `data` names, or the share that equal a reference.

        `data` has `items` and `targets`, the right texts of each item; its `measure`, if it has one, is a function of
        the references (a sequence of sequences of texts) and the predicted texts.
        """
        if not len(data.items):
            raise ClipadaptError("score needs at least one item with its texts.")
        measure: Callable[[Sequence[Sequence[str]], Sequence[str]], float] = getattr(data, "measure", exact_match)
        return measure(data.targets, self.predict(data.items))
