"""Which flags of evaluate.py each of its jobs takes."""

from collections.abc import Sequence
from pathlib import Path

from sepjax.config import ConfigError
from sepjax.files import check_file
from sepjax.flags import Jobs

PERPLEXITY, EQUAL_KV = "--task=perplexity", "--task=perplexity --compare"
STREAMING, NEEDLE, RECALL = "--task=streaming", "--task=needle", "--task=recall"
TASKS = "the tasks of lm-eval"
PERPLEXITY_ARMS, STREAMING_ARMS = f"{PERPLEXITY} --arms", f"{STREAMING} --arms"
NEEDLE_ARMS, RECALL_ARMS = f"{NEEDLE} --arms", f"{RECALL} --arms"
_WINDOWS = "text split length window_size batch_size max_documents max_tokens bos baseline near far"
_NEEDLES = "text window_size lengths depths tails trials batch_tokens"
_STREAMS = "text split max_tokens rows chunk line_wise baseline near far"

JOBS = Jobs(
    common="workdir model download dtype step task output",
    takes={
        PERPLEXITY: f"{_WINDOWS} patterns",
        PERPLEXITY_ARMS: f"{_WINDOWS} arms",
        EQUAL_KV: f"{_WINDOWS} compare compare_at",
        STREAMING: f"{_STREAMS} patterns budgets",
        STREAMING_ARMS: f"{_STREAMS} arms",
        NEEDLE: f"{_NEEDLES} patterns",
        NEEDLE_ARMS: f"{_NEEDLES} arms",
        RECALL: "patterns batch_size",
        RECALL_ARMS: "arms batch_size",
        TASKS: "patterns window_size task_data limit num_fewshot equal_kv batch_size batch_tokens apply_chat_template",
    },
)


def job_of(tasks: Sequence[str], *, compare: bool, arms: bool) -> str:
    """The job of --task, --compare and --arms; raises `ConfigError` for several tasks of which one is ours."""
    ours = {"perplexity": PERPLEXITY, "streaming": STREAMING, "needle": NEEDLE, "recall": RECALL}
    if not all(tasks) or not tasks or (len(tasks) > 1 and ours.keys() & set(tasks)):
        raise ConfigError(f"--task={','.join(tasks)}: give one of {', '.join(ours)}, or tasks of lm-eval")
    job = ours.get(tasks[0], TASKS)
    if job == PERPLEXITY and compare:
        return EQUAL_KV
    with_arms = {PERPLEXITY: PERPLEXITY_ARMS, STREAMING: STREAMING_ARMS, NEEDLE: NEEDLE_ARMS, RECALL: RECALL_ARMS}
    return with_arms.get(job, job) if arms else job


def check_output(path: Path) -> None:
    """Raises for an --output that cannot be written, before hours of scoring, or that would take a table's place."""
    if path.suffix in (".csv", ".png"):
        raise ConfigError(f"--output={path} is where the table or the picture goes; give a .json file")
    check_file(path)
