"""GET /v1/cache/ID: the text behind a response, and what the cache holds of it.

    ?layer=any|all|N   kept tokens of any layer (and key head), of all, or of layer N; the same where all keep the same
    ?last=N            of what was let go, only the last N tokens of the text are written out

A text without end has an answer with an end: all that is held (a cache is bounded), the last tokens, and between them
how many are left out.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sepjax.data.tokenizer import IncrementalDecoder
from sepjax.generation.cache.view import CacheView
from sepjax.serve.conversations import Entry
from sepjax.serve.errors import ApiError
from sepjax.serve.fields import wrong
from sepjax.serve.served import Served
from sepjax.serve.worker import Worker

_LAST, _MOST = 8192, 65536  # tokens that are written out
_STATES = ("evicted", "sink", "kept", "recent", "new")
_EVICTED, _SINK, _KEPT, _RECENT, _NEW = range(len(_STATES))


def cache_route(worker: Worker) -> Route:
    """The route."""

    async def answer(request: Request) -> Response:
        served = worker.ready()
        found = await asyncio.to_thread(_find, worker, served, request.path_params["id"], request.query_params)
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    return Route("/v1/cache/{id}", answer)


def _find(worker: Worker, served: Served, id: str, asked: Mapping[str, str]) -> dict[str, Any]:
    conversations = worker.conversations
    assert conversations is not None  # the worker is ready
    if not conversations.is_on:
        raise ApiError(404, "this server keeps no conversations (--cache_memory=0)", code="cache_not_kept")
    entry = conversations.get(id)
    row = None if entry is None else conversations.row(entry)
    if entry is None or row is None:
        raise ApiError(
            404, f"the cache of response {id[:80]!r} is not kept: the conversation went on, or others took its room",
            param="id", code="cache_not_kept",
        )  # fmt: skip
    unknown = set(asked) - {"layer", "last"}
    if unknown:
        name = min(unknown)
        raise ApiError(400, f"unknown parameter {name[:80]!r}; there are layer and last", param=name[:80])
    return described(served, entry, row.view(), layer=asked.get("layer", "any"), last=asked.get("last", str(_LAST)))


def described(served: Served, entry: Entry, view: CacheView, *, layer: str, last: str) -> dict[str, Any]:
    """The answer's JSON.

    Args:
      served: the model.
      entry: the text.
      view: of its row.
      layer: as the query has it.
      last: likewise.

    Raises:
      ApiError: 400 for a layer or a number that there is not.
    """
    if not (last.isascii() and last.isdigit() and len(last) < 10 and int(last) <= _MOST):
        raise wrong("last", last, f"a whole number from 0 to {_MOST}")
    layers, heads = view.num_sets
    ids, shares = np.array(entry.token_ids, np.int32), _shares(view, len(entry.token_ids), layer)
    states = _states(view, len(ids), shares > 0 if layer != "all" else shares == 1)
    return {
        "object": "cache.view", "id": entry.names[-1] if entry.names else None, "model": served.name,
        "seen": view.seen, "held": view.held, "size": served.sizes.main.cache_size, "bytes": view.nbytes,
        "sinks": view.sinks, "kept": view.kept, "recent": view.recent,
        "layers": layers, "heads": heads, "layer": layer,
        "tokens": list(_tokens(served, ids, states, shares if layers * heads > 1 else None, int(last))),
    }  # fmt: skip


def _shares(view: CacheView, size: int, layer: str) -> np.ndarray:
    """float[size]: of the sets of kept tokens that were asked for, the share that holds each token of the text."""
    sets = view.kept_positions
    if layer not in ("any", "all"):
        if not (layer.isascii() and layer.isdigit() and len(layer) < 10 and int(layer) < len(sets)):
            raise wrong("layer", layer, f"any, all, or a layer from 0 to {len(sets) - 1}")
        sets = sets[int(layer)][None]
    sets = sets.reshape(sets.shape[0] * sets.shape[1], sets.shape[2])  # nothing may be kept yet: no -1
    counts = np.zeros(size)
    for positions in sets:
        counts[np.unique(positions[(positions >= 0) & (positions < size)])] += 1
    return counts / len(sets)


def _states(view: CacheView, size: int, is_kept: np.ndarray) -> np.ndarray:
    """int[size]: places in `_STATES`. What was drawn last has yet to be taken up."""
    at = np.arange(size)
    states = np.where(is_kept, _KEPT, _EVICTED)
    states[(at >= view.seen - view.recent) & (at < view.seen)] = _RECENT
    states[at < view.sinks] = _SINK
    states[at >= view.seen] = _NEW
    return states


def _tokens(served: Served, ids: np.ndarray, states: np.ndarray, shares: np.ndarray | None, last: int) -> Any:
    """Yields an object a token, or one for many that are left out."""
    shown = (states != _EVICTED) | (np.arange(len(ids)) >= len(ids) - last)
    decoder, left_out = IncrementalDecoder(served.tokenizer), 0
    for i, (token, state) in enumerate(zip(ids.tolist(), states.tolist(), strict=True)):
        if not shown[i]:
            left_out += 1
            continue
        if left_out:
            yield {"text": "", "state": "evicted", "omitted": left_out}
            decoder, left_out = IncrementalDecoder(served.tokenizer, continues=True), 0
        text = decoder.feed(token)
        if i + 1 == len(ids) or not shown[i + 1]:
            text += decoder.flush()
        control = served.control_names.get(token) if not served.tokenizer.token_bytes(token) else None
        found: dict[str, Any] = {"id": token, "text": text if control is None else control, "state": _STATES[state]}
        if control is not None:
            found["control"] = True
        if shares is not None and state == _KEPT:
            found["share"] = round(float(shares[i]), 4)
        yield found
    if left_out:
        yield {"text": "", "state": "evicted", "omitted": left_out}
