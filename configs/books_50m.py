"""A model of 57 M parameters from scratch on books: what a kept set is worth where the model learns with it.

    python train.py --config=configs/books_50m.py --workdir=runs/books --config.data.name=FOLDER_OF_TEXTS \
        --config.data.tokenizer=TOKENIZER.json

The window's rows of 2048 tokens see 25 % of their keys. Arms of equal KV (docs/keeping.md): a gate for the upper eight
layers,

    --config.attention.pattern=gated --config.attention.gate_layer=2 --config.attention.gate_keep=8 \
    --config.attention.gate_stretch=64 --config.attention.window_size=337

and separators, `--config.attention.pattern=separator --config.attention.window_size=175`; the dense control is
`--config.attention.pattern=dense`. The vocabulary is 49,152; without `data.tokenizer` a SentencePiece model of 16,384
is trained on the texts. Hardware: a GPU or TPU with 40 GB; 170 seconds on one H200. Result on 491 books, with SmolLM2's
vocabulary: perplexity 68.6 on held-out books, the gate 68.3, separators 69.5 (docs/keeping.md).
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=49_152,
            num_layers=10,
            embed_dim=512,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=1408,
            dtype="bfloat16",
            scan_layers=False,
        ),
        attention=AttentionConfig(pattern="sink_window", num_sinks=4, window_size=508),
        data=DataConfig(tokenizer_vocab_size=16_384, sequence_length=2048, batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, final_learning_rate=1.5e-4, warmup_steps=100, accumulation_steps=2
        ),
        training=TrainingConfig(steps=1000, eval_every=1000, eval_batches=4, checkpoint_every=1000),
    )
