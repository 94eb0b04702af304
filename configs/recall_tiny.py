"""Recall beyond the window: facts in segments of random length, asked for when they are long out of sight.

    python train.py --config=configs/recall_tiny.py --workdir=runs/recall
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_dense --config.attention.pattern=dense
    python train.py --config=configs/recall_tiny.py --workdir=runs/recall_window --config.attention.pattern=sink_window
    python evaluate.py --task=recall --workdir=runs/recall

Only the answers are scored: with all tokens scored, what cannot be known (the facts, the filler) drowns them, and 5 M
tokens teach dense nothing. Hardware: a GPU, under a minute; 2 CPU cores, about 10 minutes. Result: in a trial of this
model and loss on one H200, dense has 0.34 nats an answer after 600 steps, 0.01 after 800 (guessing: 3.26; guessing
among the row's values: 1.39). The patterns have not been compared yet (docs/evaluation.md).
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
        training=TrainingConfig(steps=1500, log_every=100, eval_every=500, checkpoint_every=500),
    )
