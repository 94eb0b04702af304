"""Which flags of evaluate.py each of its jobs takes."""

from collections.abc import Sequence

from sepjax.config import ConfigError
from sepjax.flags import Jobs

PERPLEXITY, EQUAL_KV = "--task=perplexity", "--task=perplexity --compare"
STREAMING, NEEDLE, TASKS = "--task=streaming", "--task=needle", "the tasks of lm-eval"
_WINDOWS = "text split length window_size batch_size max_documents max_tokens bos"

JOBS = Jobs(
    common="workdir model download dtype step task output",
    takes={
        PERPLEXITY: f"{_WINDOWS} patterns",
        EQUAL_KV: f"{_WINDOWS} compare",
        STREAMING: "text split patterns budgets max_tokens rows chunk line_wise",
        NEEDLE: "text patterns window_size lengths depths trials batch_tokens",
        TASKS: "patterns window_size task_data limit num_fewshot equal_kv batch_size batch_tokens apply_chat_template",
    },
)


def job_of(tasks: Sequence[str], *, compare: bool) -> str:
    """The job of --task and --compare; raises ConfigError for several jobs at once."""
    ours = {"perplexity": PERPLEXITY, "streaming": STREAMING, "needle": NEEDLE}
    if not all(tasks) or not tasks or (len(tasks) > 1 and ours.keys() & set(tasks)):
        raise ConfigError(f"--task={','.join(tasks)}: give one of {', '.join(ours)}, or tasks of lm-eval")
    job = ours.get(tasks[0], TASKS)
    return EQUAL_KV if job == PERPLEXITY and compare else job
