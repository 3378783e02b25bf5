"""Studies of models that are not protocols: attacks, weight lines, surveys, pre-training."""
