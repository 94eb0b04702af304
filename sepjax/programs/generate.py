"""generates text: one answer to each --prompt, or with --stream endless text in constant memory

    sepjax generate --workdir=runs/tiny --prompt="The function" [--temperature=0.8 --seed=1 ...]
    sepjax generate --model=smollm2-135m --stream --prompt="Once" --save=kept       until Ctrl-C
    sepjax generate --model=smollm2-135m --stream --resume=kept                     continues it
    sepjax generate --model=smollm2-135m --prompts=prompts.jsonl --output=answers.jsonl     thousands of prompts

Several --prompt run as one batch. For conversations use `sepjax chat`. Answers use a cache that grows with the text, as
in training; --arm, --cache_size or --max_separators give them a bounded one, as streams have.
"""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, override

from sepjax.command.settings import AtLeast, AtMost, Repeated
from sepjax.config import ConfigError, UserError
from sepjax.programs.writing import Writing
from sepjax.progress import working

if TYPE_CHECKING:
    from sepjax.data.tokenizer import Tokenizer
    from sepjax.generation.batch import Generation
    from sepjax.generation.conversation import Conversation
    from sepjax.generation.engine import Generator
    from sepjax.generation.prompts import Prompt
    from sepjax.programs.many import Many
    from sepjax.programs.prompt_lines import Line

_WHY = {  # a text of one prompt ended
    "stop": "a --stop text came",
    "eos": "the model ended it",
    "length": "--max_new_tokens is reached",
    "repetition": "it repeats itself; --max_repeats=0 goes on",
}
_NEW_TOKENS = 128
_BATCH_SIZE = 32
_OF_PROMPTS = ("output", "batch_size", "logprobs", "top_logprobs")  # flags that are for --prompts alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Writing):
    """What is continued."""

    prompt: Annotated[tuple[str, ...], Repeated()] = ()  # text to continue; several run as a batch
    prompt_file: str = ""  # UTF-8 file whose whole text is a prompt
    # file of prompts, JSON Lines (.jsonl, .ndjson; also .gz, .zst): a text per line, or an object with "prompt" or
    # "messages" (and "tools"), and optionally "id". The answers are JSON Lines, too
    prompts: str = ""
    output: str | None = None  # with --prompts: file to write; an interrupted run continues; default: stdout
    batch_size: Annotated[int, AtLeast(1)] | None = None  # with --prompts: maximum prompts per batch; default: 32
    logprobs: bool = False  # with --prompts: write the log-probabilities of the generated tokens
    # with --prompts: write those of this many most probable tokens at each step, too
    top_logprobs: Annotated[int, AtLeast(1), AtMost(20)] | None = None
    apply_chat_template: bool = False  # put each prompt into the model's chat template
    stream: bool = False  # generate endlessly, past end-of-text tokens, until --stop or Ctrl-C
    save: str | None = None  # with --stream or --resume: folder to save the stream to when it ends

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = [name for name in ("max_repeats", "save") if getattr(self, name) is not None and not self.goes_on]
        if idle:
            raise ConfigError(
                f"--{idle[0]} does nothing for an answer to --prompt; it is for --resume, --stream: leave it out or "
                "add one of them"
            )
        self._check_prompts()
        prompts = len(self.prompt) + bool(self.prompt_file) + bool(self.prompts)
        if not prompts and not self.resume:
            raise ConfigError('nothing to continue; give --prompt="..." (once a text), --prompt_file or --prompts')
        if not prompts and self.apply_chat_template:
            raise ConfigError("--apply_chat_template does nothing without a prompt; add --prompt, or leave it out")
        if self.template_variables is not None and not self.apply_chat_template and not self.prompts:
            raise ConfigError(
                "--template_variables does nothing without --apply_chat_template; leave it out, or add that"
            )
        if self.goes_on and prompts > 1:
            flag = "--stream" if self.stream else "--resume"
            raise ConfigError(f"{flag} continues one prompt, got {prompts}; leave it out for a batch")

    def _check_prompts(self) -> None:
        """Raises ConfigError for what goes with --prompts and is given without it, and the other way round."""
        if not self.prompts:
            for name in _OF_PROMPTS:
                if getattr(self, name) not in (None, False):
                    raise ConfigError(f"--{name} does nothing without --prompts; leave it out, or add that")
            return
        for name in ("prompt", "prompt_file", "stream", "resume"):
            if getattr(self, name):
                one = "goes on with one text" if name in ("stream", "resume") else "says what is continued, too"
                raise ConfigError(f"--{name} {one}; leave it out, or --prompts")

    @property
    def goes_on(self) -> bool:
        """Whether one text goes on, past its end or from where a saved one was."""
        return self.stream or self.resume is not None

    @property
    @override
    def bounded(self) -> bool:
        """See `Bounded`: for a text without end, or by what only such a cache has."""
        sizes = self.max_separators, self.cache_size, self.arm or None
        return self.goes_on or self.pattern == "watched" or any(size is not None for size in sizes)


def main(settings: Settings) -> None:
    """Prints the answers, or text as it comes."""
    prompts, lines = _prompts(settings), _lines(settings)
    import sepjax
    from sepjax.console import say
    from sepjax.generation import saved
    from sepjax.loading import load

    if settings.save:
        saved.check_place(settings.save)
    settings.check_resume()
    model, tokenizer = load(settings.path, **settings.loading, param_dtype="working")
    control = settings.control_tokens is not False
    many, form = _encoded(settings, tokenizer, lines) if lines else None, None
    if many is not None:
        prompts = many.prompts
    elif settings.apply_chat_template:
        prompts, form = _as_messages(settings, tokenizer, prompts, control)
    new = settings.max_new_tokens or (None if settings.stream else _NEW_TOKENS)
    options = settings.options(tokenizer) | {"max_new_tokens": new, "control_tokens": control}
    options["stop_at_eos"] = not settings.stream
    if form is not None and not settings.stream:
        options |= form.ends(options)
    settings.warn(model, tokenizer, prompts, new)
    kept = settings.kept_in_words(model)
    if settings.goes_on:
        options |= settings.endless()
    elif settings.bounded:
        options["bounded"] = True
    engine = sepjax.Generator(model, tokenizer, settings.attention(model), consume=True)
    del model  # one copy of its weights is enough
    events = engine.stream(*prompts, **options) if len(prompts) < 2 and many is None else None
    if kept:
        say(kept)
    if many is not None:
        _answer_lines(engine, settings, lines, many, options)
    elif events is None:
        _answer_all(engine, prompts, **options)
    else:
        _answer_one(events, settings)


def _prompts(settings: Settings) -> "list[Prompt]":
    """The texts of --prompt and --prompt_file."""
    texts: list[Prompt] = list(settings.prompt)
    if settings.prompt_file:
        try:
            texts.append(Path(settings.prompt_file).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            name = settings.prompt_file
            raise ConfigError(f"--prompt_file={name} is not UTF-8 text: {error}; convert it first") from error
    return texts


def _lines(settings: Settings) -> "list[Line]":
    """The prompts of --prompts; looks at --output, too."""
    from sepjax.programs import answer_lines, prompt_lines

    if not settings.prompts:
        return []
    lines = prompt_lines.read_lines(settings.prompts)
    if settings.template_variables is not None and not _has_chats(settings, lines):
        raise ConfigError(
            f"--template_variables does nothing for {settings.prompts!r}, which has no conversations; leave it out"
        )
    if settings.output is not None:
        answer_lines.check_output(settings.output)
    return lines


def _has_chats(settings: Settings, lines: "Sequence[Line]") -> bool:
    return settings.apply_chat_template or any(line.messages for line in lines)


def _encoded(settings: Settings, tokenizer: "Tokenizer", lines: "Sequence[Line]") -> "Many":
    from sepjax.programs.many import encode_all

    template = settings.template(tokenizer) if _has_chats(settings, lines) else None
    control = settings.control_tokens
    return encode_all(tokenizer, template, lines, as_messages=settings.apply_chat_template, control_tokens=control)


def _as_messages(
    settings: Settings, tokenizer: "Tokenizer", texts: "Sequence[Prompt]", control_tokens: bool
) -> "tuple[list[Prompt], Conversation]":
    """Token ids of each text as a user's message, up to where the answer begins; and what form they are in."""
    from sepjax.generation.conversation import conversation_of

    template = settings.template(tokenizer)
    if template is None:
        raise UserError(f"{str(settings.path)!r} has no chat template; leave out --apply_chat_template")
    messages = [[{"role": "user", "content": str(text)}] for text in texts]
    ids: list[Prompt] = [template.encode(tokenizer, message, control_tokens=control_tokens) for message in messages]
    return ids, conversation_of(tokenizer, template)


def _answer_one(events: Any, settings: Settings) -> None:
    """Prints the text as it comes; Ctrl-C ends it. A bounded stream is saved then, if asked for.

    Before the first token, Ctrl-C ends the program: it waits for a compilation, and there is nothing yet to keep.
    """
    from sepjax.generation.chat import interrupt_flag

    times: list[float] = []
    last = None
    with working("reading the prompt and compiling"):
        first = list(itertools.islice(events, 1))
    with interrupt_flag() as interrupted:
        for last in itertools.chain(first, events):
            print(last.text, end="", flush=True)
            times.append(time.perf_counter())
            if interrupted:
                break
    if last is None:
        raise UserError(
            f"nothing to go on with: the stream in {settings.resume!r} has ended ({events.finish_reason}); give it a "
            "--prompt"
        )
    print()
    if settings.goes_on and last.finish_reason in _WHY:
        print(f"ended: {_WHY[last.finish_reason]}", file=sys.stderr)
    if settings.save:
        events.save(settings.save)
        more = "" if last.finish_reason in (None, "length") else ", with a --prompt"
        print(f"saved in {settings.save}; --resume={settings.save} goes on from here{more}", file=sys.stderr)
    rate = ""
    if len(times) > 2:  # the first two tokens wait for the compilation of prefill and step
        rate = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s after compilation"
    print(f"{len(times)} tokens{rate}; {_describe([last.cache])}", file=sys.stderr)


def _answer_lines(
    engine: "Generator", settings: Settings, lines: "Sequence[Line]", many: "Many", options: dict[str, Any]
) -> None:
    """Answers --prompts, to --output or stdout."""
    from sepjax.programs.answer_lines import Answers, answers_at
    from sepjax.programs.many import answer_many, asked_of, told

    options = options | {"logprobs": settings.logprobs, "top_logprobs": settings.top_logprobs or 0}
    ids, output, new = [line.id for line in lines], settings.output, []
    at = answers_at(output, asked_of(engine, many, options), ids) if output else contextlib.nullcontext(Answers(ids))
    begun = time.perf_counter()
    with at as answers, working(f"answering {len(lines):,} prompts", len(lines), "prompts") as work:
        if answers.found:
            print(f"{len(answers.found):,} of {len(lines):,} answers were there already", file=sys.stderr)
        work.add(len(answers.found))

        def take(found: "dict[int, Generation]") -> None:
            answers.add({number: told(answer) for number, answer in found.items()})
            new.extend((len(answer.token_ids), answer.cache) for answer in found.values())
            work.add(len(found))

        size = settings.batch_size or _BATCH_SIZE
        answer_many(engine, many, options, batch_size=size, done=answers.found, answered=take)
    seconds = time.perf_counter() - begun
    if not output:
        sys.stdout.buffer.writelines(answers.lines())
    total, caches = sum(count for count, _ in new), [cache for _, cache in new]
    held = f"; {_describe(caches)}" if caches else ""
    print(f"{total} tokens, {total / seconds:.1f} tokens/s with compilation{held}", file=sys.stderr)


def _answer_all(engine: "Generator", prompts: "Sequence[Prompt]", **options: Any) -> None:
    """Prints the answers to a batch of prompts, each under its prompt."""
    begun = time.perf_counter()
    with working(f"answering {len(prompts)} prompts"):
        answers = engine.generate(prompts, **options)
    seconds = time.perf_counter() - begun
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)
        print(f">>> {text}\n{answer.text}\n")
    total = sum(len(answer.token_ids) for answer in answers)
    caches = _describe([answer.cache for answer in answers])
    print(f"{total} tokens, {total / seconds:.1f} tokens/s with compilation; {caches}", file=sys.stderr)


def _describe(caches: Sequence[Any]) -> str:
    """What the caches of all rows hold, together."""
    held, seen, size = (sum(getattr(cache, name) for cache in caches) for name in ("held", "seen", "bytes"))
    return f"cache holds {held} of {seen} tokens ({held / seen:.1%}), {size:,} bytes"
