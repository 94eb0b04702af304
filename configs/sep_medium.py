"""The Pythia-410M shape with separators: `sep_small` wider and deeper, at half its learning rate.

    python train.py --config=configs/sep_medium.py --workdir=runs/medium

Data as in `sep_small`. Hardware: one GPU or TPU of 80 GB up to a pod. Time and result: not measured yet.
"""

from pathlib import Path

from sepjax.config import Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("sep_small.py"))
    config.model.num_layers = 24
    config.model.embed_dim = 1024
    config.model.num_heads = config.model.num_kv_heads = 16
    config.model.mlp_dim = 4096
    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    return config
