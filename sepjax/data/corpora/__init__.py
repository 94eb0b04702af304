"""TFDS builders of our own: each in a folder of its own, as TFDS expects. They need no TensorFlow."""
