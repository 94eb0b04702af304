"""serves OpenAI's API over HTTP: many endless conversations, in constant memory

    sepjax serve --model=smollm2-135m --slots=64
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once"}'

The key that clients must send is --api_key, or better the environment variable SEPJAX_API_KEY. docs/serving.md lists
all fields of requests, and says how to run a server in production.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Annotated, Any

from sepjax.command.settings import AtLeast, AtMost, OneOf
from sepjax.config import ConfigError, UserError
from sepjax.programs.writing import Conversing
from sepjax.serve.bounds import MOST_HTTP, MOST_STEPS, check_memory, http_processes_of

if TYPE_CHECKING:
    from sepjax.serve.served import Served

_KEY = "SEPJAX_API_KEY"
_HERE = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Conversing):
    """What is served, to whom, and how much at once."""

    name: str | None = None  # the model's name in the API; default: the last part of --model or --workdir
    slots: Annotated[int, AtLeast(1)] = 8  # sequences that run at the same time
    tensor: Annotated[int, AtLeast(1)] = 1  # devices of this machine that share weights and caches, split by heads
    host: str = "127.0.0.1"  # address to listen on; all but this machine's own (127.0.0.1) need a key
    port: Annotated[int, AtLeast(0)] = 8000  # port to listen on; 0: any free one
    api_key: str | None = None  # key that clients must send; better set SEPJAX_API_KEY in the environment
    # answers that may wait for a slot (each of `n` counts); beyond that, 429
    max_waiting: Annotated[int, AtLeast(0)] = 256
    max_prompt_tokens: Annotated[int, AtLeast(0)] = 0  # maximum tokens of a prompt; 0: limited by --max_body_bytes only
    max_body_bytes: Annotated[int, AtLeast(1024)] = 16 << 20  # maximum bytes of a request
    max_new_tokens: Annotated[int, AtLeast(1)] = 4096  # maximum tokens of a chat answer without max_tokens
    # use the sampling settings that the model's own files recommend, where a request gives none
    sampling_defaults: bool = False
    cache_memory: Annotated[int, AtLeast(0)] = 4096  # MiB of host memory for conversations that may continue; 0: none
    # MiB of device memory for those that may continue soon; default: half of what an accelerator has left
    device_memory: Annotated[int | None, AtLeast(0)] = None
    # decode steps before the host looks at the tokens; default: 16 on an accelerator, otherwise 1
    steps: Annotated[int | None, AtLeast(1), AtMost(MOST_STEPS)] = None
    # processes for HTTP and tokenization; 0: a thread of this one; default: up to 4 with an accelerator, otherwise 0
    http_processes: Annotated[int | None, AtLeast(0), AtMost(MOST_HTTP)] = None
    state: str | None = None  # folder that keeps conversations across restarts; default: none are kept
    # maximum MiB of files in --state; the least recently used conversations are deleted first
    state_size: Annotated[int, AtLeast(1)] = 16384
    drain_seconds: float = 30.0  # time for running answers to finish after SIGTERM
    log_level: Annotated[str, OneOf(("debug", "info", "warning", "error"))] = "info"  # minimum severity to log

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port > 65535:
            raise ConfigError(f"--port={self.port} must be at most 65535")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"--drain_seconds={self.drain_seconds} must be 0 or more, and finite")
        if self.state is not None and not self.cache_memory:
            raise ConfigError("--state keeps nothing where --cache_memory=0; leave one of them out")
        check_memory(self.device_memory, self.cache_memory)
        if self.host not in _HERE and not self.key:
            raise ConfigError(
                f"--host={self.host} lets others than this machine ask, which needs a key: set {_KEY} or --api_key"
            )

    @property
    def key(self) -> str:
        """That clients must bear; "": none."""
        return self.api_key if self.api_key is not None else os.environ.get(_KEY, "")


def main(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"sepjax serve needs {', '.join(missing)}: pip install 'sepjax[serve]'")
    from sepjax import console
    from sepjax.serve import logs, process
    from sepjax.serve.app import Limits
    from sepjax.serve.running import Options, Running

    process.prepare()
    logs.begin(settings.log_level)
    limits = Limits(max_body_bytes=settings.max_body_bytes, max_new_tokens=settings.max_new_tokens)
    options = Options(
        host=settings.host, port=settings.port, rows=settings.slots, max_waiting=settings.max_waiting, limits=limits,
        api_key=settings.key, drain_seconds=settings.drain_seconds, cache_memory=settings.cache_memory << 20,
        device_memory=_bytes(settings.device_memory), steps=settings.steps, state=settings.state,
        state_bytes=settings.state_size << 20, http_processes=http_processes_of(settings.http_processes),
        log_level=settings.log_level,
    )  # fmt: skip
    with console.given_to(logs.warn):
        Running(lambda: load(settings), options).run()


def _bytes(mebibytes: int | None) -> int | None:
    return None if mebibytes is None else mebibytes << 20


def load(settings: Settings) -> "Served":
    """The model that answers, over a bounded cache."""
    import jax

    import sepjax
    from sepjax.generation import limits
    from sepjax.loading import load, locate
    from sepjax.serve.served import Served
    from sepjax.sharding import check_heads

    mesh = mesh_of(settings.tensor)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model, tokenizer = load(settings.path, **settings.loading, param_dtype="working", mesh=mesh)
        if mesh is not None:
            check_heads(mesh, model.config.num_heads)
        where = locate(settings.path)
        attention = settings.attention(model)
        if line := settings.kept_in_words(model):
            logging.getLogger("sepjax.serve").info(line)
        limits.warn_of_cache(model.config, attention, limits.trained_length(where, model.config))
        engine: Any = sepjax.Generator(model, tokenizer, attention, consume=True)
        del model  # one copy of its weights is enough
        name = settings.name or settings.path.name or "model"
        alias = None if settings.name else settings.model  # a hub's name whole, as other servers have it
        return Served.create(
            name, engine, settings.template(tokenizer), max_prompt_tokens=settings.max_prompt_tokens, alias=alias,
            sampling_defaults=settings.sampling_defaults,
        )  # fmt: skip


def mesh_of(tensor: int) -> Any:
    """The first devices of this machine as a mesh; None: one needs none. Raises ConfigError where there are fewer."""
    if tensor == 1:
        return None
    import jax

    from sepjax.config import MeshConfig
    from sepjax.sharding import make_mesh

    devices = jax.local_devices()
    if len(devices) < tensor:
        raise ConfigError(f"--tensor={tensor} needs as many devices on this machine, and there are {len(devices)}")
    return make_mesh(MeshConfig(data=1, tensor=tensor), devices[:tensor])
