"""A gate for a model as it is, learned from what the dense model looks at from afar.

    python -m sepjax.distill --config=configs/post_gated.py --workdir=runs/distilled --config.data.name=FOLDER_OF_TEXTS

The workdir holds the model of `training.init_from`, unchanged, and the gate. evaluate.py and sepjax.load read it, and a
run begins with it by --config.training.init_from=runs/distilled.
"""

from pathlib import Path

from absl import flags

from sepjax.config import Config
from sepjax.distill.program import Lesson, distill
from sepjax.flags import run_main

if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder to write, new or empty", required=True)
    ROWS = flags.DEFINE_integer("rows", Lesson.rows, "rows of the training split to learn from", lower_bound=1)
    HELD_OUT = flags.DEFINE_integer(
        "held_out", Lesson.held_out, "rows of the evaluation split that grade", lower_bound=1
    )
    STEPS = flags.DEFINE_integer("steps", Lesson.steps, "of Adam, for each of two losses", lower_bound=1)
    RATE = flags.DEFINE_float("learning_rate", Lesson.learning_rate, "of Adam at first; a cosine takes it to 0")
    DOWNLOAD = flags.DEFINE_bool("download", False, "fetch --config.training.init_from from the Hugging Face hub")

    def main(config: Config) -> None:
        """Observes, learns, grades and writes."""
        lesson = Lesson(ROWS.value, HELD_OUT.value, STEPS.value, RATE.value)
        distill(config, Path(WORKDIR.value), lesson, download=DOWNLOAD.value)

    run_main(main, with_config=True)
