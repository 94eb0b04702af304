"""Which flags of `python -m sepjax.generate` each of its modes takes."""

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
