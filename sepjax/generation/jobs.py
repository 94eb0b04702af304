"""Which flags of `python -m sepjax.generate` each of its modes takes."""

from absl import flags

from sepjax.config import ConfigError
from sepjax.flags import Jobs

ANSWER, RESUME, STREAM, CHAT = "an answer to --prompt", "--resume", "--stream", "--chat"
_BOUNDED = "resume max_repeats max_separators cache_size"
_PROMPTS = "prompt prompt_file apply_chat_template"

JOBS = Jobs(
    common="workdir model download dtype step max_new_tokens temperature top_k top_p min_p sampling_defaults seed stop "
    "stop_token_ids control_tokens pattern window_size num_sinks",
    takes={
        ANSWER: _PROMPTS,
        RESUME: f"{_PROMPTS} {_BOUNDED} save",
        STREAM: f"{_PROMPTS} {_BOUNDED} save stream",
        CHAT: f"{_BOUNDED} chat system",
    },
)


def job_of(*, stream: bool, chat: bool, resume: bool) -> str:
    """The mode that flags ask for; --chat and --stream together are --chat, which refuses --stream."""
    return CHAT if chat else STREAM if stream else RESUME if resume else ANSWER


def check_sense(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Raises `ConfigError` for flags that others on the command line leave without effect."""
    given = {
        name for name in JOBS.names(CHAT) | JOBS.names(STREAM) if name in flag_values and flag_values[name].present
    }
    draws = sorted(given & {"top_k", "top_p", "min_p"})
    if draws and not flag_values["temperature"].value and not flag_values["sampling_defaults"].value:
        raise ConfigError(
            f"--{draws[0]} does nothing where the best token is always taken; add --temperature=1, or leave it out"
        )
    sizes = sorted(given & {"window_size", "num_sinks"})
    if sizes and flag_values["pattern"].value == "dense":
        raise ConfigError(
            f"--{sizes[0]} does nothing for --pattern=dense, which sees everything; leave one of them out"
        )
