"""The corpus of drawn images and captions that the embedded model was pre-trained on."""
