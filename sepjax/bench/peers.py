"""Tokens a second of whole answers beside those of Hugging Face's transformers: the same weights, prompts and device.

    python -m sepjax.bench.peers --model=smollm2-135m [--torch_python=.venv-torch/bin/python --batch_sizes=1,16]

transformers runs in a process of its own, under a Python that has it and torch, before this one takes the device: with
its default cache, and with a static cache whose step it compiles (`cache_implementation="static"`; on a GPU). sepjax
answers with the dense model's cache, which grows, and with a bounded one. Prompts are random tokens, every answer is as
long as asked and takes the best token at each step. Each case runs twice before it is timed, from prompt to last token.
bfloat16, on a CPU float32. The last line is JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np

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
from sepjax.progress import counted

_WORKER = Path(__file__).with_name("peers_worker.py")
_EXPORT = (
    "import sys, sepjax; from sepjax.hub.export import save_folder; save_folder(*sepjax.load(sys.argv[1]), sys.argv[2])"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """What is measured."""

    model: str  # smollm2-135m, a Hugging Face folder, a GGUF file, a workdir
    torch_python: str = "python3"  # a Python that has torch and transformers
    budget: str = "4/64/256/800"  # of the bounded cache: sinks/separators/window/cache
    batch_sizes: Annotated[tuple[int, ...], AtLeast(1)] = (1, 16)  # prompts at a time
    prompt_tokens: Annotated[int, AtLeast(1)] = 512  # of each
    new_tokens: Annotated[int, AtLeast(1)] = 512  # of each answer


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


def theirs(settings: Settings) -> tuple[dict[str, str], list[Case]]:
    """(versions and device, figures) of transformers.

    Raises:
      UserError: that Python lacks torch or transformers, or cannot run the model.
    """
    s = settings
    with tempfile.TemporaryDirectory() as folder:
        source = Path(s.model)
        if not is_folder(source):
            source = Path(folder) / "model"
            on_host = os.environ | {"JAX_PLATFORMS": "cpu"}
            _output([sys.executable, "-c", _EXPORT, s.model, str(source)], "a folder of the model", on_host)
        vocab_size = config_shape(source / "config.json", dtype="bfloat16").vocab_size
        files = [str(Path(folder) / f"{rows}.npy") for rows in s.batch_sizes]
        for file, rows in zip(files, s.batch_sizes, strict=True):
            np.save(file, prompts(vocab_size, rows, s.prompt_tokens))
        asked = {"folder": str(source), "prompts": files, "new": s.new_tokens}
        lines = _output(
            [s.torch_python, str(_WORKER), json.dumps(asked)], f"--torch_python={s.torch_python}"
        ).splitlines()
    told = json.loads(lines[-1])
    if "error" in told:
        raise UserError(
            f"--torch_python={s.torch_python} {told['error']}; name a Python that has torch and transformers"
        )
    return told["versions"], [Case(**x) for x in told["cases"]]


def _output(words: list[str], what: str, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    except OSError as error:
        raise UserError(f"{what}: cannot run {words[0]!r}: {error.strerror}") from error
    if done.returncode or (what.startswith("--") and not done.stdout.strip()):
        raise UserError(f"{what} failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return done.stdout


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
    versions, cases = theirs(s)
    source = provenance() | versions
    print(heading(source) + "".join(f", {name} {version}" for name, version in versions.items()))
    print(f"{s.prompt_tokens:,} tokens of prompt, {s.new_tokens:,} of answer a row")
    model, tokenizer = load(s.model)
    cases += counted(ours(model, tokenizer, s), "answering", 2 * len(s.batch_sizes), "cases")
    for x in cases:
        print(f"{x.name:<40}{x.rows:>6} rows{x.seconds:>10.3f} s{x.tokens_per_second(s.new_tokens):>12,.0f} tokens/s")
    figures = [dataclasses.asdict(x) | {"tokens_per_second": x.tokens_per_second(s.new_tokens)} for x in cases]
    print(json.dumps(source | {"prompt_tokens": s.prompt_tokens, "new_tokens": s.new_tokens, "figures": figures}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
