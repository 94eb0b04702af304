"""A first run: a 2.6M-parameter Llama-style decoder on the embedded corpus, on a laptop CPU.

    python train.py --config=configs/sep_tiny.py --workdir=runs/tiny

Hardware: 2 CPU cores, 4 GB of memory. Time and result: not measured yet.
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=4096, num_layers=4, embed_dim=192, num_heads=4, num_kv_heads=4, head_dim=48, mlp_dim=512
        ),
        attention=AttentionConfig(num_sinks=3, window_size=32),
        data=DataConfig(tokenizer_vocab_size=4096, sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=20),
        training=TrainingConfig(steps=400, log_every=10, eval_every=100, checkpoint_every=100),
    )
