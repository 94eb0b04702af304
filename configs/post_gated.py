"""Post-training with a gate: the model learns which tokens are worth keeping, in their context.

    pip install "sepjax[smollm2]"
    python train.py --config=configs/post_gated.py --workdir=runs/post_gated --config.data.name=FOLDER_OF_TEXTS

`post_small.py` but for this: rows of 4096 tokens; layers 0 to 7 see sinks and a window of 400; a small network on their
output scores every token, and the best 4 of every 64 stay visible for layers 8 to 29. The last token of a row sees
9.9 % of the keys below and 15.5 % above, 14.0 % averaged over layers.

The gate is drawn at random and learns with the model. To begin with one that has learned from the dense model which
tokens are looked at from afar, make a workdir with

    python -m sepjax.distill --config=configs/post_gated.py --workdir=runs/distilled --config.data.name=FOLDER_OF_TEXTS

and add --config.training.init_from=runs/distilled. That workdir is of use by itself: a gate for the model as it is. For
a model of another depth than SmolLM2-135M's set --config.model.num_layers and --config.attention.gate_layer.
Hardware: a GPU or TPU with 40 GB. Time and result: not measured yet.
"""

import dataclasses
from pathlib import Path

from sepjax.config import AttentionConfig, Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("post_small.py"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=30),
        attention=AttentionConfig(
            pattern="gated", num_sinks=4, window_size=400, gate_layer=8, gate_stretch=64, gate_keep=4
        ),
        data=dataclasses.replace(config.data, sequence_length=4096),
    )
