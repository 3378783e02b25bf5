"""Studies of models that are no protocol: attacks, weight lines, surveys, pre-training."""
