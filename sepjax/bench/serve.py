"""A server under rising load: time to first token, time per output token, tokens per second, memory.

    sepjax bench serve --model=smollm2-135m --slots=256 --budget=4/64/256/800
    sepjax bench serve --config=configs/sep_tiny.py --slots=8 --budget=2/8/16/64     the shape, with random weights
    sepjax bench serve --url=http://127.0.0.1:8000 --slots=64                        a server that runs already

The load is a process of its own (`sepjax.bench.load` says what conversations are like). `--loads`: "full" keeps all
slots busy, "80%" begins that share of the conversations a second that were answered so, a number is conversations a
second. With --dense_context=N the same is measured for a cache of equal memory that keeps the last N tokens whole. The
bare loop is `sepjax bench steps` with as many rows: the most that a server could reach. The last line is JSON.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from sepjax import children
from sepjax.bench import load
from sepjax.command.flags import run_settings
from sepjax.command.settings import AtLeast, AtMost, OneOf
from sepjax.command.settings import Settings as _Settings
from sepjax.config import CACHE_DTYPES, AttentionConfig, Config, ConfigError, ModelConfig, UserError, load_config
from sepjax.serve.bounds import MOST_HTTP, MOST_STEPS, check_memory, http_processes_of, steps_of

if TYPE_CHECKING:
    from sepjax.serve.worker import Worker

_BEGAN = time.monotonic()
_STARTS = 1.0  # seconds that the load's process needs to begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which server, and which loads."""

    url: str | None = None  # of a running server; default: one is started here, with --model or --config
    api_key: str = ""  # with --url: key of that server
    model: str | None = None  # anything sepjax.load reads
    config: str | None = None  # config file whose shape to serve, with random weights
    pattern: str = "separator"  # pattern of the bounded cache
    budget: str = "4/64/256/800"  # sizes of the bounded cache: sinks/separators/window/cache
    # dtype of cached keys and values: the model's, or int8 in about half the bytes; default: the config's
    cache_dtype: Annotated[str, OneOf(CACHE_DTYPES)] | None = None
    slots: Annotated[int, AtLeast(1)] = 8  # slots of the server; with --url: as it was started with
    cache_memory: Annotated[int, AtLeast(0)] = 4096  # MiB of host memory for conversations that may continue
    # MiB of device memory for those that may continue soon; default: half of what an accelerator has left
    device_memory: Annotated[int | None, AtLeast(0)] = None
    # decode steps before the host looks at the tokens; default: 16 on an accelerator, otherwise 1
    steps: Annotated[int | None, AtLeast(1), AtMost(MOST_STEPS)] = None
    # processes for HTTP; 0: a thread of this one; default: as for `sepjax serve`
    http_processes: Annotated[int | None, AtLeast(0), AtMost(MOST_HTTP)] = None
    # tokens of a dense cache of equal memory to measure as well; 0: none
    dense_context: Annotated[int, AtLeast(0)] = 0
    loads: tuple[str, ...] = ("full", "25%", "50%", "80%", "95%")  # loads to measure, in this order
    seconds: float = 30.0  # duration of each load; the first quarter is warm-up
    bare_seconds: float = 5.0  # duration of the bare decode loop of as many rows; 0: not measured
    prompt_median: float = 60.0  # tokens of a message, median of a lognormal distribution
    prompt_sigma: float = 0.8  # standard deviation of its logarithm
    answer_median: float = 120.0  # tokens of an answer, median of a lognormal distribution
    answer_sigma: float = 0.6  # standard deviation of its logarithm
    turns: float = 4.0  # turns of a conversation, mean of a geometric distribution
    pause: float = 1.0  # seconds between turns, mean of an exponential distribution; none at "full"
    seed: int = 0  # seed of the load
    profile: bool = False  # also report where the server's time goes, part by part; not with --url

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("url", "model", "config") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(f"give --url, --model or --config, one of them: got {' and '.join(given) or 'none'}")
        for name in ("prompt", "answer"):
            median, sigma = getattr(self, f"{name}_median"), getattr(self, f"{name}_sigma")
            if not (1 <= median < 1e6 and 0 <= sigma <= 3):
                raise ConfigError(
                    f"--{name}_median must be 1 or more and --{name}_sigma 0 to 3, got {median} and {sigma}"
                )
        if not (self.seconds > 0 and self.turns >= 1 and self.pause >= 0 and self.bare_seconds >= 0):
            raise ConfigError("--seconds must be above 0, --turns 1 or more, --pause and --bare_seconds 0 or more")
        if self.url and self.dense_context:
            raise ConfigError(
                "--dense_context starts another server, which goes with --model or --config, not with --url"
            )
        for name in ("cache_dtype", "device_memory", "steps", "http_processes"):
            if self.url and getattr(self, name) is not None:
                raise ConfigError(f"--{name} is of a server that is started here, with --model or --config, not --url")
        if self.url and self.profile:
            raise ConfigError("--profile looks into a server of this process: give --model or --config, not --url")
        check_memory(self.device_memory, self.cache_memory)
        for name in self.loads:
            share_of(name)


def share_of(name: str) -> tuple[float, bool]:
    """(number, whether it is a share of what "full" reaches) of a load; ("full": (0, False)). Raises ConfigError."""
    try:
        number = 0.0 if name == "full" else float(name.removesuffix("%"))
        if number > 0 or name == "full":
            return (number / 100, True) if name.endswith("%") else (number, False)
    except ValueError:
        pass
    raise ConfigError(f'--loads takes "full", shares like 80% and conversations a second like 2.5, got {name!r}')


def in_order(loads: Sequence[str]) -> list[str]:
    """The loads, "full" before the first share: it says what of."""
    names = list(dict.fromkeys(loads))
    if any(share_of(name)[1] for name in names):
        names = ["full", *(name for name in names if name != "full")]
    return names


# -- loads ---------------------------------------------------------------------------------------------------------


def measure(
    settings: Settings, url: str, slots: int, label: str, worker: "Worker | None" = None
) -> list[dict[str, Any]]:
    """Runs the loads on a server and prints a line each; returns their figures. `worker`: whose time is looked into."""
    if worker is not None:
        from sepjax.bench import spent
    capacity, figures = 0.0, []
    for number, name in enumerate(in_order(settings.loads)):
        value, is_share = share_of(name)
        rate = value * capacity if is_share else value
        if is_share and not rate:
            raise UserError(
                "no answer was complete at full load, so there is nothing to take shares of; raise --seconds"
            )
        users = 0 if rate else slots + max(1, slots // 2)  # a row that gets free has somebody waiting
        plan = load.Plan(
            url, settings.seconds, rate, users, settings.prompt_median, settings.prompt_sigma, settings.answer_median,
            settings.answer_sigma, settings.turns, settings.pause, settings.seed + number, settings.api_key,
        )  # fmt: skip
        memory = None if settings.url else _memory()  # that of this process says nothing about a server elsewhere
        found: dict[str, Any] = {"cache": label, "slots": slots, "load": name, "memory": memory}
        _tell(f"the load: {name}")
        found |= _in_a_process(plan) if worker is None else _watched(plan, worker)
        if name == "full":
            capacity = found["turns_per_second"] / settings.turns
        print(_row(found) + _launches(found["launches"]), flush=True)
        if worker is not None:
            print(
                f"{spent.table(found['spent'])}\n  its clients: {found['client_busy']:.0%} of a processor", flush=True
            )
        figures.append(found)
    return figures


def _watched(plan: load.Plan, worker: "Worker") -> dict[str, Any]:
    from sepjax.bench import spent

    begin = load.WARM * plan.seconds + _STARTS
    with spent.Watch(worker, begin, plan.seconds - begin) as watch:
        found = _in_a_process(plan)
    return found | {"spent": watch.found}


def _in_a_process(plan: load.Plan) -> dict[str, Any]:
    """The load from outside: threads of one Python would take time from each other."""
    command = children.command("sepjax.bench.load")  # the plan has a key in it, and all may see arguments
    words = json.dumps(dataclasses.asdict(plan))
    environment = children.environment()
    done = subprocess.run(command, input=words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the load on {plan.url} failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _memory() -> dict[str, int]:
    """Bytes now: of the first device, where it tells, and of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"resident": resident} | ({"device": stats["bytes_in_use"]} if "bytes_in_use" in stats else {})


_COLUMNS = (
    f"{'cache':<26}{'load':>7}{'conv/s':>8}{'requests':>9}{'errors':>7}"
    f"{'first p50':>11}{'p99':>8}{'token p50':>11}{'p99':>8}"
    f"{'tokens/s':>10}{'cached':>8}{'running':>9}{'held':>9}{'cache MB':>10}{'memory MB':>11}"
)


def _row(x: dict[str, Any]) -> str:
    def ms(name: str, width: int) -> str:
        return f"{'-' if x[name] is None else format(1e3 * x[name], ',.0f'):>{width}}"

    rate = f"{x['rate']:.2f}" if x["rate"] else "-"
    memory = "-" if x["memory"] is None else f"{x['memory'].get('device', x['memory']['resident']) / 1e6:,.0f}"
    times = f"{ms('first_token_p50', 11)}{ms('first_token_p99', 8)}{ms('per_token_p50', 11)}{ms('per_token_p99', 8)}"
    return (
        f"{x['cache']:<26}{x['load']:>7}{rate:>8}{x['requests']:>9}{x['errors']:>7}{times}"
        f"{x['tokens_per_second']:>10,.0f}{x['cached_share']:>8.0%}{x['running']:>9.1f}{x['slots_held']:>9,.0f}"
        f"{x['cache_bytes'] / 1e6:>10,.1f}{memory:>11}" + (f"  {x['first_error']}" if x["errors"] else "")
        + (f"  /metrics: {x['metrics_error']}" if x["metrics_error"] else "")
    )  # fmt: skip


def _launches(x: dict[str, float] | None) -> str:
    """A line about what the device was asked for."""
    if x is None:
        return ""
    return (
        f"\n  {x['per_second']:.1f} launches a second: {x['milliseconds_before_steps']:.1f} ms for rows that begin and "
        f"prompts, {x['milliseconds_steps']:.1f} for {x['steps']:.1f} steps of {x['rows_generating']:.1f} rows; "
        f"{x['rows_to_be_read']:.1f} rows have something left to read"
    )


# -- a server of our own -------------------------------------------------------------------------------------------


def serve_and_measure(settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Figures of the bounded cache and, if asked for, of a dense one of equal memory; and what is said beside them."""
    from sepjax.bench.steps import caches_of, in_types

    model, tokenizer = _model(settings)
    caches = caches_of(
        model.attention, model.config.num_layers, settings.budget, settings.dense_context, (settings.pattern,)
    )
    bounded, *dense = in_types(caches, (settings.cache_dtype,) if settings.cache_dtype else ()).items()
    row = row_bytes(model, bounded[1])
    figures, said = [], {"row_bytes": row}
    figures += _one(settings, model, tokenizer, *bounded, settings.slots, said)
    for name, attention in dense:
        dense_row = row_bytes(model, attention)
        slots = settings.slots * row // dense_row
        print(f"in the memory of {settings.slots} rows of {row:,} bytes, {slots} dense rows of {dense_row:,} find room")
        said |= {"dense_row_bytes": dense_row, "dense_slots": slots}
        if slots:
            figures += _one(settings, model, tokenizer, name, attention, slots, said)
    return figures, said


def row_bytes(model: Any, attention: AttentionConfig) -> int:
    """Of one row's cache."""
    import jax

    from sepjax.generation.cache.mixed import bounded_sizes, empty_cache

    sizes = bounded_sizes(model.config, attention)
    shapes = jax.eval_shape(lambda: empty_cache(model.config, 1, sizes, by_layer=True))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _model(settings: Settings) -> tuple[Any, Any]:
    import jax

    if settings.model is not None:
        from sepjax.loading import load as read

        return read(settings.model)
    from pydoc_data.topics import topics

    from sepjax.data.tokenizer import train_sentencepiece
    from sepjax.model.transformer import create

    config = load_config(str(settings.config))
    tokenizer = train_sentencepiece(list(topics.values()), min(4096, config.model.vocab_size))
    return create(config.model, config.attention, jax.random.key(0)), tokenizer


def _one(
    settings: Settings, model: Any, tokenizer: Any, name: str, attention: AttentionConfig, slots: int,
    said: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """A server with this cache, measured; the bare loop first, while nothing else has memory."""
    from sepjax.generation.engine import Generator
    from sepjax.serve import process
    from sepjax.serve.running import Options, Running
    from sepjax.serve.served import Served

    process.prepare()
    _tell("laying out the weights")
    engine = Generator(model, tokenizer, attention)
    _tell("the bare loop")
    bare = _bare(settings, engine, model.config, slots)
    _tell("the server: compiling" if bare is None else f"it makes {bare:,.0f} tokens/s; the server: compiling")
    served = Served.create("bench", engine, None)
    said["steps"], said["http_processes"] = steps_of(settings.steps), http_processes_of(settings.http_processes)
    options = Options(
        rows=slots, max_waiting=4 * slots + 64, cache_memory=settings.cache_memory << 20, drain_seconds=5,
        device_memory=_bytes(settings.device_memory), steps=said["steps"], http_processes=said["http_processes"],
    )  # fmt: skip
    with Running(lambda: served, options) as server:
        _tell("the server is ready")
        figures = measure(settings, server.url, slots, name, server.worker if settings.profile else None)
    if settings.profile and server.worker.slots is not None:
        from sepjax.bench import spent

        said["alone_milliseconds"] = server.worker.slots.alone()
        print(spent.alone_table(said["alone_milliseconds"]))
    for figure in figures if bare else ():
        figure["bare_tokens_per_second"] = bare
    if bare:
        best = max(figure["tokens_per_second"] for figure in figures)
        print(f"the bare loop of {slots} rows makes {bare:,.0f} tokens/s; the server reached {best / bare:.0%} of it")
    return figures


def _tell(what: str) -> None:
    """A line on stderr for whoever waits, with the seconds since the process began."""
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {what}", file=sys.stderr, flush=True)


def _bytes(mebibytes: int | None) -> int | None:
    return None if mebibytes is None else mebibytes << 20


def _bare(settings: Settings, engine: Any, model: ModelConfig, slots: int) -> float | None:
    if not settings.bare_seconds:
        return None
    from sepjax.bench.steps import loop_speed

    config, size = dataclasses.replace(Config(), model=model, attention=engine.kept), engine.tokenizer.vocab_size
    params = engine.prepared.params
    return loop_speed(config, params, engine.kept, slots, settings.bare_seconds, size).tokens_per_second


def _listen_to_logs() -> None:
    """What is compiled, and what goes wrong, is told on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("          %(message)s"))
    for name, level in (("sepjax.slots", logging.INFO), ("sepjax.serve", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers, logger.propagate = [handler], False


def main(settings: Settings) -> None:
    """Prints a line a load, then JSON."""
    from sepjax.measure import heading, provenance

    _listen_to_logs()
    source = provenance(has_device=not settings.url)
    print(heading(source))
    print(_COLUMNS + "   (times in ms)")
    if settings.url:
        figures, said = measure(settings, settings.url.rstrip("/"), settings.slots, settings.url), {}
    else:
        figures, said = serve_and_measure(settings)
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k != "api_key"}
    print(json.dumps(source | {"settings": asked, **said, "figures": figures}))


if __name__ == "__main__":
    run_settings(Settings, main, str(__doc__))
