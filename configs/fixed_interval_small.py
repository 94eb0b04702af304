"""`sep_small` with every 8th token kept in place of separators: does it matter which tokens stay? (FixLLM.)

    python train.py --config=configs/fixed_interval_small.py --workdir=runs/fixed_interval_small

Data, hardware and hints as in `sep_small`, which differs in one field. Time and result: not measured yet.
"""

from pathlib import Path

from sepjax.config import Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("sep_small.py"))
    config.attention.pattern = "fixed_interval"
    return config
