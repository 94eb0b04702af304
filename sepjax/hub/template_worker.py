"""The process that runs chat templates: a program of its own, which imports jinja2 and nothing else of weight.

A template is a program that comes with a checkpoint. jinja2's sandbox keeps it from files and from Python's insides,
but not from loops without end or from texts of gigabytes, which it may even make while it is only read. Here the system
bounds both. Each line of standard input is a request, each line of standard output its answer, in JSON:

    {"source": ..., "values": {...} or null}   ->   {"text": ...} | {"unreadable": why} | {"fails": why}
    {..., "answers": "all" or "last"}          ->   {"text": ..., "spans": [[first, last], ...]} | ...

The spans are the characters that an assistant says: what is between {% generation %} and {% endgeneration %}, or of a
template without these, what it writes behind the prompt for an answer, up to where the next message begins.

Started by `sepjax.hub.chat_template`, by its file, so that nothing of this package is imported.
"""

import contextlib
import datetime
import functools
import itertools
import json
import math
import re
import resource
import sys
import time
from typing import Any, ClassVar, Never

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of computing that a request may take, and one more for each million bytes of it
_MEMORY = 2**29  # bytes, and 32 for each byte of the request
_OPEN, _CLOSE = "\ufdd2", "\ufdd3"  # noncharacters, which no text may have
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEXT = 10_000_000  # characters that a template may write, and eight for each byte of the request


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers for training, and writes what is inside."""

    tags: ClassVar[set[str]] = {"generation"}
    marks = False  # whether it marks them now

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}" if _Generation.marks else caller()


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> Never:
    """What templates call for messages that they cannot write."""
    raise jinja2.TemplateError(message)


class _Namespace(jinja2.utils.Namespace):
    """What templates keep values in from one turn of a loop to the next; no names of Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a value may be named "self"
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may hold no name that begins with '_', but got {name!r}")


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["namespace"] = _Namespace
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def answer(request: dict[str, Any], size: int) -> dict[str, Any]:
    """The answer to one request of `size` bytes. Anything may go wrong in a template: every error is an answer."""
    try:
        template = _compiled(request["source"])
    except Exception as error:
        return {"unreadable": _reason(error)}
    if request["values"] is None:
        return {"text": ""}
    spans: dict[str, Any] = {}
    try:
        if "answers" not in request:
            text = template.render(request["values"])
        elif _GENERATION.search(request["source"]):
            text, spans["spans"] = _generated(template, request["values"])
        else:
            text, spans["spans"] = _by_prefixes(template, request["values"], request["answers"] == "last")
    except Exception as error:
        return {"fails": _reason(error)}
    if len(text) > _TEXT + 8 * size:
        return {"fails": f"it writes {len(text):,} characters, more than {_TEXT + 8 * size:,}"}
    if request.get("answers") == "last":
        spans["spans"] = spans["spans"][-1:]
    return {"text": text, **spans}


def _generated(template: jinja2.Template, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text and what the template itself marks in it."""
    _Generation.marks = True
    try:
        parts = re.split(f"[{_OPEN}{_CLOSE}]", template.render(values))
    finally:
        _Generation.marks = False
    ends = list(itertools.accumulate(map(len, parts)))
    return "".join(parts), [(ends[i - 1], ends[i]) for i in range(1, len(parts), 2)]


def _by_prefixes(
    template: jinja2.Template, values: dict[str, Any], only_last: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and of every answer what stands behind the prompt for it, in the text up to it.

    Raises TemplateError where the template does not write the first messages of a conversation as it does alone.
    """
    messages, text = values["messages"], template.render(values)
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for i in numbers[-1:] if only_last else numbers:
        before = _prompt(template, values, i)
        until = text if i + 1 == len(messages) else template.render({**values, "messages": messages[: i + 1]})
        if not until.startswith(before):
            raise jinja2.TemplateError(f"the prompt for messages[{i}] is not how it writes that message")
        if not text.startswith(until):
            raise jinja2.TemplateError(f"messages[:{i + 1}] are written otherwise once others follow")
        spans.append((len(before), len(until)))
    return text, spans


def _prompt(template: jinja2.Template, values: dict[str, Any], i: int) -> str:
    """What stands before the answer messages[i]."""
    try:
        return template.render({**values, "messages": values["messages"][:i], "add_generation_prompt": True})
    except Exception as error:  # of no messages many templates ask for the first all the same
        if i or isinstance(error, MemoryError | RecursionError):
            raise
        why = "messages[0] is an assistant's, and the template cannot write a prompt before it"
        raise jinja2.TemplateError(why) from error


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than a template may have"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:500]


def _limit(what: int, most: int) -> None:
    """Bounds a resource of this process, where the system can do that."""
    _, hard = resource.getrlimit(what)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Answers requests until standard input ends. Too much computing ends it by SIGXCPU."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_AS, _MEMORY + 32 * len(line))
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + SECONDS + len(line) // 1_000_000)
        try:
            written = json.dumps(answer(json.loads(line), len(line)))
        except MemoryError as error:
            written = json.dumps({"fails": _reason(error)})
        sys.stdout.buffer.write(written.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
