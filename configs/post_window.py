"""Post-training with a plain window: what every other kept set has to beat at equal KV.

    python train.py --config=configs/post_window.py --workdir=runs/post_window --config.data.name=FOLDER_OF_TEXTS

`post_small.py` with rows of 4096 tokens and no separators: the last token of a row sees 4 sinks and a window of 657,
16.1 % of the row. `--config.attention.pattern=dense` makes it the dense control. Hardware: one H200,
3 minutes for 150 steps (`--config.training.steps=150`). Result of these: perplexity 25.02 on held-out books
(docs/keeping.md).

The shape is SmolLM2's because `training.init_from` is; another one has its own `model.num_layers`. What loads no model
(`sepjax plan`, `sepjax bench`, an empty `training.init_from`) has 30 layers that are only 256 wide.
"""

import dataclasses
from pathlib import Path

from sepjax.config import AttentionConfig, Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("post_small.py"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=30),
        attention=AttentionConfig(pattern="sink_window", num_sinks=4, window_size=657),
        data=dataclasses.replace(config.data, sequence_length=4096),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=4e-4, final_learning_rate=4e-5),
    )
