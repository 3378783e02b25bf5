"""How a method is judged: each module is one protocol, named after its key (see `evaluation.protocol`)."""

from clipadapt.renamed import old_names

__getattr__ = old_names(__name__)
