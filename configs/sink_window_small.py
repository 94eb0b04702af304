"""`sep_small` without separators: sinks and the local window only, the mask of StreamingLLM (arXiv 2309.17453).

    python train.py --config=configs/sink_window_small.py --workdir=runs/sink_window_small

Data, hardware and hints as in `sep_small`, which differs in one field. Time and result: not measured yet.
Published for this shape and schedule: LAMBADA perplexity 44.03.
"""

from pathlib import Path

from sepjax.config import Config, load_config


def get_config() -> Config:
    config = load_config(Path(__file__).with_name("sep_small.py"))
    config.attention.pattern = "sink_window"
    return config
