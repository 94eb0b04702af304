"""The dense control of `sep_small`: causal attention, everything else the same.

    python train.py --config=configs/dense_small.py --workdir=runs/dense_small

Data, hardware and hints as in `sep_small`, which differs in one field. Time and result: not measured yet.
Published for this shape and schedule: LAMBADA perplexity 34.83.
"""

from pathlib import Path

from sepjax.config import Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("sep_small.py"))
    config.attention.pattern = "dense"
    return config
