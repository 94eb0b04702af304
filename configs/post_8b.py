r"""Supervised fine-tuning of an 8-billion-parameter model on 8 GPUs of 80 GB: every parameter, or adapters.

    hf download Qwen/Qwen3-8B config.json
    sepjax plan --config=configs/post_8b.py --topology=h100:1x8             # before anything is paid for
    python train.py --config=configs/post_8b.py --workdir=runs/qwen --config.data.name=conversations.jsonl --download
    python train.py --config=configs/post_8b.py --workdir=runs/lora --config.data.name=conversations.jsonl --download \
        --config.lora.rank=16 --config.lora.alpha=32 --config.optimizer.learning_rate=2e-4
    python train.py --config=configs/post_8b.py --workdir=runs/llama --config.data.name=conversations.jsonl \
        --config.training.init_from=models/llama-3.1-8b-instruct

Parameters are split over all devices, layers are computed again for the backward pass. Hardware: 8 GPUs of 80 GB, or
fewer, or TPUs: docs/post_training.md has the memory of each, from compilers. Time: 12,900 tokens/s with adapters on
one H200. Result: not measured.
"""

from sepjax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(dtype="bfloat16", remat="full"),
        attention=AttentionConfig(num_sinks=4, window_size=256),
        data=DataConfig(name="conversations.jsonl", sequence_length=8192, batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=20, weight_decay=0.0, accumulation_steps=4
        ),
        training=TrainingConfig(steps=1000, eval_every=100, checkpoint_every=100, init_from="Qwen/Qwen3-8B"),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
