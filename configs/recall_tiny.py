"""Recall beyond the window: facts in segments of random length, asked for when they are long out of sight.

    python train.py --config=configs/recall_tiny.py --workdir=runs/recall
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_dense --config.attention.pattern=dense
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_window --config.attention.pattern=sink_window
    python evaluate.py --task=recall --workdir=runs/recall

Hardware: 2 CPU cores, about 10 minutes for 3000 steps at 11k tokens/s. Result: not learned yet. After
2600 steps (5.3M tokens) dense is at chance, 3.26 nats, as a window is (docs/evaluation.md).
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=257, num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=2, head_dim=32, mlp_dim=128
        ),
        attention=AttentionConfig(num_sinks=1, window_size=8),
        data=DataConfig(name="recall", tokenizer_vocab_size=257, sequence_length=64, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=100),
        training=TrainingConfig(steps=3000, log_every=100, eval_every=500, checkpoint_every=1000),
    )
