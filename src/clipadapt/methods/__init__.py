"""Every published way of adapting a CLIP-like model that the library holds: one file each, in family folders."""

from typing import TYPE_CHECKING

from clipadapt.lazy import lazily

_HOMES = {
    "Card": "clipadapt.methods.card",
    "Classifier": "clipadapt.methods.tasks.classification",
    "FeatureMethod": "clipadapt.methods.kinds.features",
    "FineTuningMethod": "clipadapt.methods.kinds.weights",
    "ImageMethod": "clipadapt.methods.kinds.images",
    "Method": "clipadapt.methods.base",
    "PromptLearner": "clipadapt.methods.kinds.prompts",
    "PromptMethod": "clipadapt.methods.kinds.prompts",
    "Run": "clipadapt.training.loop",
    "Support": "clipadapt.methods.kinds.features",
    "TrainingData": "clipadapt.methods.training_data",
    "WeightMethod": "clipadapt.methods.kinds.weights",
    "Wrapper": "clipadapt.methods.kinds.wrapper",
    "create": "clipadapt.methods.registry",
    "hyper": "clipadapt.methods.card",
    "list_methods": "clipadapt.methods.registry",
    "load": "clipadapt.methods.loading",
    "method": "clipadapt.methods.registry",
    "method_class": "clipadapt.methods.registry",
    "why_not": "clipadapt.methods.training_data",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazily(__name__, _HOMES)

if TYPE_CHECKING:
    from clipadapt.methods.base import Method as Method
    from clipadapt.methods.card import Card as Card
    from clipadapt.methods.card import hyper as hyper
    from clipadapt.methods.kinds.features import FeatureMethod as FeatureMethod
    from clipadapt.methods.kinds.features import Support as Support
    from clipadapt.methods.kinds.images import ImageMethod as ImageMethod
    from clipadapt.methods.kinds.prompts import PromptLearner as PromptLearner
    from clipadapt.methods.kinds.prompts import PromptMethod as PromptMethod
    from clipadapt.methods.kinds.weights import FineTuningMethod as FineTuningMethod
    from clipadapt.methods.kinds.weights import WeightMethod as WeightMethod
    from clipadapt.methods.kinds.wrapper import Wrapper as Wrapper
    from clipadapt.methods.loading import load as load
    from clipadapt.methods.registry import create as create
    from clipadapt.methods.registry import list_methods as list_methods
    from clipadapt.methods.registry import method as method
    from clipadapt.methods.registry import method_class as method_class
    from clipadapt.methods.tasks.classification import Classifier as Classifier
    from clipadapt.methods.training_data import TrainingData as TrainingData
    from clipadapt.methods.training_data import why_not as why_not
    from clipadapt.training.loop import Run as Run
