"""What a document of the builders is to TFDS, which takes long to import: `splits.py` is read without it."""

import tensorflow_datasets as tfds

FEATURES = {"text": tfds.features.Text(), "name": tfds.features.Text()}
