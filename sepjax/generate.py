"""The command line of `sepjax.generate` and `sepjax.stream`, which are in `sepjax.generation.api`.

python -m sepjax.generate --workdir=runs/tiny --prompt="The function" [--temperature=0.8 --seed=1 ...]
python -m sepjax.generate --workdir=runs/tiny --prompt="The function" --stream    without end, in constant memory
python -m sepjax.generate --model=smollm2-135m --chat                             in turns, over one bounded cache
"""

import dataclasses
import itertools
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sepjax.config import BOUNDED_PATTERNS, AttentionConfig, ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.flags import one_of_two, run_main, whole_numbers
from sepjax.generation import limits, saved
from sepjax.generation.api import generate, stream
from sepjax.generation.batch import Generation
from sepjax.generation.chat import chat, interrupt_flag
from sepjax.generation.conversation import conversation_of
from sepjax.generation.jobs import JOBS, check_sense, job_of
from sepjax.generation.prompts import Prompt, PromptError, encode_prompts
from sepjax.generation.row import CacheUse
from sepjax.generation.stream import Stream
from sepjax.hub.chat_template import ChatTemplate
from sepjax.loading import load, locate
from sepjax.model.transformer import Transformer

_WHY = {  # a text of one prompt ended
    "stop": "a --stop text came",
    "eos": "the model ended it",
    "length": "--max_new_tokens is reached",
    "repetition": "it repeats itself; --max_repeats=0 goes on",
}


def _answer_one(events: Stream, save: str = "") -> None:
    """Prints the text as it comes; Ctrl-C ends it. A bounded stream is saved then, if asked for.

    Before the first token, Ctrl-C ends the program: it waits for a compilation, and there is nothing yet to keep.
    """
    times: list[float] = []
    last = None
    first = list(itertools.islice(events, 1))
    with interrupt_flag() as interrupted:
        for last in itertools.chain(first, events):
            print(last.text, end="", flush=True)
            times.append(time.perf_counter())
            if interrupted:
                break
    print()
    if events.cache_size is not None and last is not None and last.finish_reason in _WHY:
        print(f"ended: {_WHY[last.finish_reason]}", file=sys.stderr)
    if save:
        events.save(save)
        print(f"saved in {save}; --resume={save} goes on from here", file=sys.stderr)
    if last is None:
        print("nothing to go on with: the saved stream has ended; give it a --prompt", file=sys.stderr)
        return
    rate = ""
    if len(times) > 2:  # the first two tokens wait for the compilation of prefill and step
        rate = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s after compilation"
    print(f"{len(times)} tokens{rate}; {_describe(last.cache)}", file=sys.stderr)


def _answer_all(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], **settings: Any) -> None:
    """Prints the answers to a batch of prompts, each under its prompt."""
    begun = time.perf_counter()
    answers = generate(model, tokenizer, prompts, **settings)
    seconds = time.perf_counter() - begun
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        print(f">>> {text}\n{answer.text}\n")
    total = sum(len(answer.token_ids) for answer in answers)
    cache = CacheUse(*(sum(sizes) for sizes in zip(*(dataclasses.astuple(a.cache) for a in answers), strict=True)))
    print(f"{total} tokens, {total / seconds:.1f} tokens/s with compilation; {_describe(cache)}", file=sys.stderr)


def _describe(cache: CacheUse) -> str:
    return f"cache holds {cache.held} of {cache.seen} tokens ({cache.kv_kept:.1%}), {cache.bytes:,} bytes"


def _read_prompts(prompts: Sequence[str], file: str) -> list[Prompt]:
    """The texts of --prompt and --prompt_file."""
    texts: list[Prompt] = list(prompts)
    if file:
        try:
            texts.append(Path(file).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise PromptError(f"--prompt_file={file} is no UTF-8 text: {error}; convert it first") from error
    if not texts:
        raise PromptError('nothing to continue; give --prompt="..." (once a text) or --prompt_file')
    return texts


def _as_messages(path: Path, tokenizer: Tokenizer, texts: Sequence[Prompt], control_tokens: bool) -> list[Prompt]:
    """Token ids of each text as a user's message, up to where the answer begins."""
    template = ChatTemplate.of_model(path, tokenizer)
    if template is None:
        raise PromptError(f"{str(path)!r} has no chat template; leave out --apply_chat_template")
    messages = [[{"role": "user", "content": str(text)}] for text in texts]
    return [template.encode(tokenizer, message, control_tokens=control_tokens) for message in messages]


class _CallableModule(types.ModuleType):
    """Makes `sepjax.generate(...)` work: Python binds this module to that name once anything has imported it."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Generation]:
        """See `generate`."""
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run of train.py")
    MODEL = flags.DEFINE_string(
        "model", None, "a pretrained model: smollm2-135m, a Hugging Face folder, a GGUF file, an id on the hub"
    )
    DOWNLOAD = flags.DEFINE_bool("download", False, "with --model=OWNER/NAME: fetch it from the Hugging Face hub")
    DTYPE = flags.DEFINE_string("dtype", None, "with --model: of the arithmetic; default: bfloat16, on a CPU float32")
    STEP = flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; several times: a batch")
    FILE = flags.DEFINE_string("prompt_file", "", "UTF-8 file whose whole text is a prompt")
    LENGTH = flags.DEFINE_integer("max_new_tokens", None, "tokens after which an answer ends; default: 128")
    ENDLESS = flags.DEFINE_bool("stream", False, "go on without end, past every end of text, until --stop or Ctrl-C")
    CHAT = flags.DEFINE_bool("chat", False, "talk in turns over one bounded cache; Ctrl-C cuts an answer short")
    SYSTEM = flags.DEFINE_string("system", "", "with --chat: instructions in front of the first turn")
    RESUME = flags.DEFINE_string("resume", None, "folder of a saved stream or conversation to go on with")
    SAVE = flags.DEFINE_string("save", "", "of --stream and --resume: folder to keep the stream in when it ends")
    REPEATS = flags.DEFINE_integer(
        "max_repeats", 12, "end an endless text that repeats one run of tokens more often in a row; 0: never"
    )
    TEMPLATE = flags.DEFINE_bool("apply_chat_template", False, "put each prompt into the model's chat template")
    CONTROL = flags.DEFINE_bool(
        "control_tokens", None, "names of control tokens in your texts are these tokens; default: not with --chat"
    )
    TEMPERATURE = flags.DEFINE_float("temperature", None, "0, the default: always the best token; above: draw")
    TOP_K = flags.DEFINE_integer("top_k", None, "draw from the k best tokens; 0, the default: all")
    TOP_P = flags.DEFINE_float("top_p", None, "draw from the fewest tokens that reach this probability; default: 1")
    MIN_P = flags.DEFINE_float("min_p", None, "draw from tokens at least so many times as probable as the best")
    DEFAULTS = flags.DEFINE_bool("sampling_defaults", False, "of these four, what the model's own files recommend")
    SEED = flags.DEFINE_integer("seed", 0, "of the draws")
    STOP = flags.DEFINE_multi_string("stop", [], "text that ends an answer; several times: any of them")
    STOP_IDS = flags.DEFINE_list("stop_token_ids", [], "token ids that end an answer, besides the model's own")
    PATTERN = flags.DEFINE_enum("pattern", None, list(BOUNDED_PATTERNS), "attention pattern; default: as in training")
    WINDOW = flags.DEFINE_integer("window_size", None, "n of every layer; default: as in training")
    SINKS = flags.DEFINE_integer("num_sinks", None, "first tokens that are always seen; default: as in training")
    KEPT = flags.DEFINE_integer("max_separators", None, "separators that a bounded cache keeps; default: the config's")
    SLOTS = flags.DEFINE_integer("cache_size", None, "entries of a bounded cache; default: the config's")

    def _attention(model: Transformer) -> AttentionConfig:
        changes: dict[str, Any] = {} if PATTERN.value is None else {"pattern": PATTERN.value}
        if WINDOW.value is not None:
            changes |= {"window_size": WINDOW.value, "layer_windows": ()}
        for name, flag in (("num_sinks", SINKS), ("max_separators", KEPT), ("cache_size", SLOTS)):
            changes |= {} if flag.value is None else {name: flag.value}
        return dataclasses.replace(model.attention, **changes)

    def _warn(
        path: str, model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], attention: AttentionConfig,
        new: int | None,
    ) -> None:  # fmt: skip
        source = locate(path)
        trained, bounded = (
            limits.trained_length(source, model.config),
            ENDLESS.value or CHAT.value or bool(RESUME.value),
        )
        longest = max(map(len, encode_prompts(tokenizer, prompts)), default=0) if prompts else 0
        limits.warn_of_length(model.config, attention, longest, new, trained, bounded=bounded)

    def main() -> None:
        """Answers the prompts, or talks."""
        JOBS.check(job_of(stream=ENDLESS.value, chat=CHAT.value, resume=RESUME.value is not None))
        check_sense()
        if LENGTH.value is not None and LENGTH.value < 1:
            raise ConfigError(f"--max_new_tokens={LENGTH.value} must be 1 or more")
        endless = ENDLESS.value or CHAT.value
        needs_none = CHAT.value or (RESUME.value and not PROMPT.value and not FILE.value)
        prompts: list[Prompt] = [] if needs_none else _read_prompts(PROMPT.value, FILE.value)
        if (endless or RESUME.value) and len(prompts) > 1:
            flag = "--stream" if endless else "--resume"
            raise PromptError(f"{flag} continues one prompt, got {len(prompts)}; leave it out for a batch")
        path = one_of_two("workdir", WORKDIR.value, "model", MODEL.value)
        if SAVE.value:
            saved.check_place(SAVE.value)
        model, tokenizer = load(path, step=STEP.value, dtype=DTYPE.value, download=DOWNLOAD.value)
        control = not CHAT.value if CONTROL.value is None else CONTROL.value
        if TEMPLATE.value:
            prompts = _as_messages(locate(path), tokenizer, prompts, control)
        form = None
        if CHAT.value:
            template = ChatTemplate.of_model(locate(path), tokenizer)
            form = conversation_of(tokenizer, template, system=SYSTEM.value, control_tokens=control)
        settings: dict[str, Any] = {
            "max_new_tokens": LENGTH.value if endless or LENGTH.value else 128,
            "stop_at_eos": not ENDLESS.value,
            "temperature": TEMPERATURE.value,
            "top_k": TOP_K.value,
            "top_p": TOP_P.value,
            "min_p": MIN_P.value,
            "sampling_defaults": DEFAULTS.value,
            "control_tokens": control,
            "seed": SEED.value,
            "stop": [*STOP.value, *(form.stop if form else ())],
            "stop_token_ids": [
                *whole_numbers("stop_token_ids", STOP_IDS.value, least=0),
                *(form.stop_token_ids if form else ()),
            ],
            "attention": _attention(model),
        }
        _warn(path, model, tokenizer, prompts, settings["attention"], settings["max_new_tokens"])
        if endless or RESUME.value:
            settings |= {"bounded": True, "max_repeats": REPEATS.value, "resume": RESUME.value}
        if CHAT.value:
            events = stream(model, tokenizer, **settings)
            chat(events, tokenizer, conversation=form)
        elif len(prompts) > 1:
            _answer_all(model, tokenizer, prompts, **settings)
        else:
            _answer_one(stream(model, tokenizer, *prompts, **settings), SAVE.value)

    run_main(main)
