r"""The Pythia-160M shape trained from scratch with separators, as in the paper (arXiv 2412.12094, a=3, n=64).

    python train.py --config=configs/sep_small.py --workdir=runs/small

starts on any machine, without a download, on the embedded corpus and a SentencePiece vocabulary of 16384. That corpus
is far too small for 143,000 steps; the published run reads the deduplicated Pile with the NeoX vocabulary. For a text
dataset and a tokenizer of yours, add

    --config.data.name=FOLDER_OR_TFDS_NAME --config.data.tokenizer=FOLDER/tokenizer.json

A step is 1024 rows of 2048 tokens in 64 micro-batches of 16 rows, about 10 GB of activations. More devices than 16 need
fewer micro-batches: --config.optimizer.accumulation_steps=4 serves 256. For a look at a few steps, add

    --config.data.batch_size=2 --config.optimizer.accumulation_steps=1 \
    --config.training.steps=5 --config.optimizer.warmup_steps=1

Hardware: one GPU or TPU of 40 GB up to a pod; 438,000 tokens/s on one H200, 1.6 million on four (docs/results.md).
Result of the whole schedule: not measured yet. Published for this shape and schedule: LAMBADA perplexity 40.08 at
17.2 % of the causal pairs (dense 34.83).
"""

from sepjax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainingConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=50304,
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_dim=3072,
            norm="layernorm",
            activation="gelu",
            gated_mlp=False,
            attention_bias=True,
            mlp_bias=True,
            parallel_residual=True,
            rope=RopeConfig(fraction=0.25),
            tie_embeddings=False,
            dtype="bfloat16",
            scan_layers=False,
        ),
        attention=AttentionConfig(num_sinks=3, window_size=64),
        data=DataConfig(tokenizer_vocab_size=16384, sequence_length=2048, batch_size=1024),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=1430, accumulation_steps=64
        ),
        training=TrainingConfig(steps=143_000, eval_every=1000, eval_batches=4, checkpoint_every=1000),
    )
