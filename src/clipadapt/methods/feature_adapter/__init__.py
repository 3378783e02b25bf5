"""Methods that train on frozen features."""
