"""The corpus of drawn images and captions that the embedded model was pre-trained on."""

from clipadapt.renamed import old_names

__getattr__ = old_names(__name__)
