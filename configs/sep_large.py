"""The Pythia-1.4B shape with separators: parameters sharded over all devices, matmul outputs kept for backward.

    python train.py --config=configs/sep_large.py --workdir=runs/large

Data as in `sep_small`. Hardware: 8 GPUs or TPUs of 80 GB up to a pod. Time and result: not measured yet.
"""

from pathlib import Path

from sepjax.config import Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("sep_small.py"))
    config.model.num_layers = 24
    config.model.embed_dim = 2048
    config.model.num_heads = config.model.num_kv_heads = 16
    config.model.head_dim = 128
    config.model.mlp_dim = 8192
    config.model.remat = "dots"
    config.model.scan_layers = True
    config.optimizer.learning_rate = 2e-4
    config.optimizer.final_learning_rate = 2e-5
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
