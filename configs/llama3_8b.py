r"""The Llama-3-8B shape at a post-training schedule: grouped queries, parameters sharded over all devices, full remat.

    python train.py --config=configs/llama3_8b.py --workdir=runs/llama3 \
        --config.data.name=FOLDER_OR_TFDS_NAME --config.data.tokenizer=LLAMA_FOLDER/tokenizer.json

It starts from random weights; to begin with a checkpoint see `configs/post_small.py`. Window and sinks are those of the
paper's training-free runs on this model (a=4, n=256). Hardware: 8 GPUs of 80 GB or a TPU pod. Time and result: not
measured yet.
"""

from sepjax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainingConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=128_256,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            max_positions=8192,
            rope=RopeConfig(base=500_000.0),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        attention=AttentionConfig(num_sinks=4, window_size=256),
        data=DataConfig(sequence_length=8192, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=2e-5, final_learning_rate=2e-6, warmup_steps=20, accumulation_steps=4),
        training=TrainingConfig(steps=1000, eval_every=100, checkpoint_every=100),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
