"""What goes between the process of the slots and those that answer HTTP: frames over a socket pair.

    frame     4 bytes: length of the JSON | 4 bytes: length of the rest | JSON | the rest: token ids and hashes

Both sides are one version of one program, started by one another; nothing here is read from elsewhere.
"""

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from sepjax.generation.row import CacheUse, StreamEvent
from sepjax.generation.sampling import Sampling
from sepjax.generation.slots import SlotRequest
from sepjax.serve.conversations import BLOCK
from sepjax.serve.errors import ApiError
from sepjax.serve.jobs import Begun, Failed, Inbox, Item, Job, Paused, Share

HEAD = struct.Struct(">II")
_HASH = 16  # bytes of a block's
_NUMBERS = "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


def frame(said: Any, rest: bytes = b"") -> bytes:
    """One message: its JSON and bytes behind it."""
    data = _ENCODE(said).encode()
    return HEAD.pack(len(data), len(rest)) + data + rest


# -- errors and items -----------------------------------------------------------------------------------------------


def told_error(error: ApiError) -> list[Any]:
    """An error as JSON has it."""
    return [error.status, error.message, error.param, error.code, error.retry_after]


def error_of(told: Sequence[Any]) -> ApiError:
    """What `told_error` told."""
    status, message, param, code, retry_after = told
    return ApiError(status, message, param=param, code=code, retry_after=retry_after)


def told_item(choice: int, item: Item) -> list[Any]:
    """An item of a choice as JSON has it."""
    if isinstance(item, StreamEvent):
        return [choice, item.text, item.token_ids, item.finish_reason, item.cache, item.logprob, item.top_logprobs]
    if isinstance(item, Begun):
        return [choice, item.cached]
    return [choice] if isinstance(item, Paused) else [choice, *told_error(item.error)]


def item_of(told: Sequence[Any]) -> tuple[int, Item]:
    """What `told_item` told: they differ in their lengths."""
    choice, *values = told
    if len(values) == 6:
        text, ids, reason, cache, logprob, top = values
        top = None if top is None else tuple((token, value) for token, value in top)
        return choice, StreamEvent(text, tuple(ids), reason, CacheUse(*cache), logprob, top)
    if len(values) == 1:
        return choice, Begun(values[0])
    return choice, Failed(error_of(values)) if values else Paused()


# -- requests -------------------------------------------------------------------------------------------------------


def told_jobs(number: int, jobs: Sequence[Job]) -> bytes:
    """The choices of one HTTP request, whose settings differ in their seeds alone; `number`: of its inbox."""
    prompts: dict[int, Job] = {}
    for job in jobs:
        prompts.setdefault(id(job.ids), job)
    places, first = {key: i for i, key in enumerate(prompts)}, jobs[0]
    said = {
        "jobs": number, "client": first.client, "came": first.came, "request": _told_request(first.request),
        "prompts": [len(job.ids) for job in prompts.values()],
        "choices": [[job.choice, job.name, job.request.seed, places[id(job.ids)]] for job in jobs],
        "shared": 0 if first.share is None else first.share.to_begin,
    }  # fmt: skip
    rest = b"".join(np.ascontiguousarray(job.ids, np.int32).tobytes() for job in prompts.values())
    return frame(said, rest + b"".join(b"".join(job.blocks) for job in prompts.values()))


def jobs_of(said: dict[str, Any], rest: bytes, inbox: Inbox) -> list[Job]:
    """What `told_jobs` told; they come through `inbox`."""
    sizes: list[int] = said["prompts"]
    ids = np.split(np.frombuffer(rest, np.int32, sum(sizes)), np.cumsum(sizes)[:-1])
    at, blocks = 4 * sum(sizes), []
    for size in sizes:
        ends = range(at + _HASH, at + size // BLOCK * _HASH + 1, _HASH)
        blocks.append(tuple(rest[end - _HASH : end] for end in ends))
        at += size // BLOCK * _HASH
    request, jobs = _request_of(said["request"]), []
    shares = [Share(said["shared"]) if said["shared"] else None for _ in sizes]
    inbox.choices = len(said["choices"])
    for choice, name, seed, i in said["choices"]:
        asked = dataclasses.replace(request, seed=seed)
        job = Job(inbox, choice, ids[i], asked, said["client"], said["came"], name, blocks[i])
        job.share = shares[i]
        jobs.append(job)
    return jobs


def _told_request(request: SlotRequest) -> dict[str, Any]:
    """All of it but prompt, seed and the row to go on with, which no HTTP request has."""
    said = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    sampling: Any = request.sampling
    given = sampling.bias_ids >= 0
    said["sampling"] = {
        "numbers": [float(getattr(sampling, name)) for name in _NUMBERS], "top_k": int(sampling.top_k),
        "bias_ids": sampling.bias_ids[given].tolist(), "bias": sampling.bias[given].tolist(),
    }  # fmt: skip
    return said | {"seed": None}


def _request_of(said: dict[str, Any]) -> SlotRequest:
    told = said["sampling"]
    sampling: Any = Sampling.create()
    arrays: Any = {name: np.asarray(x, np.float32) for name, x in zip(_NUMBERS, told["numbers"], strict=True)}
    size = len(told["bias_ids"])
    sampling.bias_ids[:size], sampling.bias[:size] = told["bias_ids"], told["bias"]
    sampling = dataclasses.replace(sampling, top_k=np.asarray(told["top_k"], np.int32), **arrays)
    return SlotRequest(**said | {"sampling": sampling})
