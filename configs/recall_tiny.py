"""Recall beyond the window: facts in segments of random length, asked for when they are long out of sight.

    python train.py --config=configs/recall_tiny.py --workdir=runs/recall
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_dense --config.attention.pattern=dense
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_window --config.attention.pattern=sink_window
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_gate --config.attention.pattern=gated \
        --config.attention.gate_layer=1 --config.attention.gate_stretch=8 --config.attention.gate_keep=3
    python evaluate.py --task=recall --workdir=runs/recall

Only the answers are scored: with all tokens scored, what cannot be known (the facts, the filler) drowns them, and 5 M
tokens teach dense nothing. Hardware: a GPU, 3 minutes; 2 CPU cores, an hour. Result on one H200: dense, separators
and a gate that keeps 3 of every 8 tokens answer all questions, a window of 8 none, a gate that keeps 2 of 8 40 % of
them (docs/evaluation.md).
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=257, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=256
        ),
        attention=AttentionConfig(num_sinks=1, window_size=8),
        data=DataConfig(
            name="recall", tokenizer_vocab_size=257, sequence_length=64, batch_size=256, loss_on=r"\?[A-Z]([a-z])"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100),
        training=TrainingConfig(steps=4000, log_every=100, eval_every=1000, checkpoint_every=1000),
    )
