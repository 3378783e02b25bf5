"""Studies of backbones that are methods too."""
