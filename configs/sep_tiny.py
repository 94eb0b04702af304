"""A first run: a 1.1M-parameter Llama-style decoder on the embedded corpus, on a laptop CPU.

    python train.py --config=configs/sep_tiny.py --workdir=runs/tiny

Hardware: 2 CPU cores, 2 GB of memory. Time: 100 seconds. Expected: eval/loss 4.54, below 4.7 in any case
(docs/results.md).
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=2048, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384
        ),
        attention=AttentionConfig(num_sinks=3, window_size=32),
        data=DataConfig(tokenizer_vocab_size=2048, sequence_length=256, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3.5e-3, final_learning_rate=1e-4, warmup_steps=60),
        training=TrainingConfig(steps=470, log_every=20, eval_every=470, checkpoint_every=235),
    )
