"""What tasks share whose answers point into class names."""

from __future__ import annotations

from typing import Any

from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Method
from clipadapt.methods.training_data import TrainingData


class NamedClasses(Method):
    """Remembers the names of the classes that it was fitted on, and refuses to be fitted without any."""

    class_names_: list[str]

    def _open(self, model: Any, data: TrainingData) -> None:
        super()._open(model, data)
        if not data.class_names:
            raise ClipadaptError(f"{self.card.key}.fit needs a support set or class_names.")
        self.class_names_ = list(data.class_names)
