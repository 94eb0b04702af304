"""What runs of train.py leave, read by several suites."""

import json
from pathlib import Path


def losses(workdir: Path) -> dict[int, float]:
    """The last loss written of every step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
