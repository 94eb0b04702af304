"""Tokens per second of whole answers, against Hugging Face's transformers on the same weights, prompts and device.

    sepjax bench peers --model=smollm2-135m [--torch_python=.venv-torch/bin/python --batch_sizes=1,16]

transformers runs in a process of its own, under a Python that has it and torch, before this one takes the device: with
its default cache, and with a static cache whose step it compiles (`cache_implementation="static"`; on a GPU). sepjax
answers with the dense model's cache, which grows, and with a bounded one. Prompts are random tokens, every answer is as
long as asked and takes the best token at each step. Each case runs twice before it is timed, from prompt to last token.
bfloat16, on a CPU float32. The last line is JSON.
"""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Generator as Generates
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from sepjax import children
from sepjax.bench.steps import caches_of
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings
from sepjax.config import UserError, under
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.engine import Generator
from sepjax.hub.folder import config_shape, is_folder
from sepjax.loading import load
from sepjax.measure import heading, provenance
from sepjax.model.transformer import Transformer

_WORKER = Path(__file__).with_name("peers_worker.py")
_EXPORT = (
    "import sys, sepjax; from sepjax.hub.export import save_folder; save_folder(*sepjax.load(sys.argv[1]), sys.argv[2])"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured."""

    model: str  # smollm2-135m, a Hugging Face folder, a GGUF file, a workdir
    torch_python: str = "python3"  # a Python with torch and transformers
    compiled: bool = True  # on a GPU: also measure transformers with a compiled step over a static cache
    budget: str = "4/64/256/800"  # sizes of the bounded cache: sinks/separators/window/cache
    batch_sizes: Annotated[tuple[int, ...], AtLeast(1)] = (1, 16)  # prompts at a time
    prompt_tokens: Annotated[int, AtLeast(1)] = 512  # tokens of each prompt
    new_tokens: Annotated[int, AtLeast(1)] = 512  # tokens of each answer


@dataclasses.dataclass(frozen=True)
class Case:
    """Answers to some prompts."""

    name: str  # who answered, over which cache
    rows: int
    seconds: float  # from prompts to last tokens

    def tokens_per_second(self, new_tokens: int) -> float:
        """Of all answers together."""
        return self.rows * new_tokens / self.seconds


def prompts(vocab_size: int, rows: int, tokens: int) -> np.ndarray:
    """Random ids [rows, tokens] int32, control tokens at the front of the vocabulary left out where it is large."""
    return np.random.default_rng(0).integers(min(64, vocab_size // 2), vocab_size, (rows, tokens), np.int32)


def theirs(settings: Settings) -> Iterator[dict[str, Any]]:
    """Of transformers: first the versions of what answers, then a case after the other, as they are timed.

    Raises:
      UserError: that Python lacks torch or transformers, or cannot run the model.
    """
    s = settings
    with tempfile.TemporaryDirectory() as folder:
        source = Path(s.model)
        if not is_folder(source):
            source = Path(folder) / "model"
            on_host = children.environment() | {"JAX_PLATFORMS": "cpu"}
            export = children.python("-c", _EXPORT, s.model, str(source))
            for _ in _lines(export, "a folder of the model", on_host):
                pass
        vocab_size = config_shape(source / "config.json", dtype="bfloat16").vocab_size
        files = [str(Path(folder) / f"{rows}.npy") for rows in s.batch_sizes]
        for file, rows in zip(files, s.batch_sizes, strict=True):
            np.save(file, prompts(vocab_size, rows, s.prompt_tokens))
        asked = {"folder": str(source), "prompts": files, "new": s.new_tokens, "compiled": s.compiled}
        words, what = [s.torch_python, str(_WORKER), json.dumps(asked)], f"--torch_python={s.torch_python}"
        with contextlib.closing(_lines(words, what)) as lines:
            for told in map(json.loads, lines):
                if "error" in told:
                    raise UserError(f"{what} {told['error']}; name a Python that has torch and transformers")
                yield told


def _lines(words: list[str], what: str, env: dict[str, str] | None = None) -> Generates[str]:
    """What a program prints, line by line."""
    with tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True, env=env)
        except OSError as error:
            raise UserError(f"{what}: cannot run {words[0]!r}: {error.strerror}") from error
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:  # noqa: UP028  `yield from` would close the pipe first
                    yield line
            except GeneratorExit:  # left early
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            raise UserError(f"{what} failed: {(said.read().strip().splitlines() or ['no reason'])[-1]}")


def ours(model: Transformer, tokenizer: Tokenizer, settings: Settings) -> Iterator[Case]:
    """Figures of sepjax: the dense model's growing cache, and a bounded one."""
    s = settings
    (bounded,) = caches_of(model.attention, model.config.num_layers, s.budget, 0).values()
    for name, attention, is_bounded in (
        ("sepjax, dense, growing", under(model.attention, "dense"), False),
        (f"sepjax, bounded {s.budget}", bounded, True),
    ):
        engine = Generator(model, tokenizer, attention)
        for rows in s.batch_sizes:
            ids = [[int(i) for i in row] for row in prompts(model.config.vocab_size, rows, s.prompt_tokens)]
            seconds = _third_run(
                lambda ids=ids, engine=engine, is_bounded=is_bounded: engine.generate(
                    ids, max_new_tokens=s.new_tokens, stop_at_eos=False, bounded=is_bounded
                )
            )
            yield Case(name, rows, seconds)


def _third_run(run: Callable[[], Any]) -> float:
    run()
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(settings: Settings) -> None:
    """Prints a line a case, then JSON."""
    s = settings
    told = theirs(s)
    versions, cases = next(told), []
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{s.prompt_tokens:,} tokens of prompt, {s.new_tokens:,} of answer a row")
    for x in itertools.chain((Case(**x) for x in told), _loaded(s)):
        rate = x.tokens_per_second(s.new_tokens)
        print(f"{x.name:<40}{x.rows:>6} rows{x.seconds:>10.3f} s{rate:>12,.0f} tokens/s", flush=True)
        cases.append(dataclasses.asdict(x) | {"tokens_per_second": rate})
    source = provenance() | versions
    print(heading(source))
    print(json.dumps(source | {"prompt_tokens": s.prompt_tokens, "new_tokens": s.new_tokens, "figures": cases}))


def _loaded(settings: Settings) -> Iterator[Case]:
    """`ours`, of a model that is loaded when transformers has ended."""
    yield from ours(*load(settings.model), settings)


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
