"""The speed of a training step."""
