"""GET /v1/cache/ID: the text behind a response, and what the cache holds of it.

    ?layer=any|all|N   kept tokens of any layer (and key head), of all, or of layer N; the same where all keep the same
    ?last=N            of what was let go, only the last N tokens of the text are written out

A text without end has an answer with an end: all that is held (a cache is bounded), the last tokens, and between them
how many are left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sepjax.data.tokenizer import IncrementalDecoder
from sepjax.generation.cache.mixed import MixedSizes
from sepjax.generation.cache.view import CacheView
from sepjax.serve.asked import Asked
from sepjax.serve.conversations import Conversations, Entry
from sepjax.serve.errors import ApiError
from sepjax.serve.fields import wrong
from sepjax.serve.served import Served

_LAST, _MOST = 8192, 65536  # tokens that are written out
_STATES = ("evicted", "sink", "kept", "recent", "new")
_EVICTED, _SINK, _KEPT, _RECENT, _NEW = range(len(_STATES))


def cache_route(worker: Asked) -> Route:
    """The route."""

    async def answer(request: Request) -> Response:
        worker.ready()
        found = await worker.view(request.path_params["id"], request.query_params)
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    return Route("/v1/cache/{id}", answer)


def find(served: Served, conversations: Conversations, id: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """What the cache behind a response holds, as JSON; may read it from disk.

    Args:
      served: the model.
      conversations: that are kept.
      id: of the response.
      asked: the query's parameters.

    Raises:
      ApiError: 404 where it is not kept, 400 for a parameter that there is not.
    """
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
        message = f"unknown parameter {name[:80]!r}; there are layer and last"
        raise ApiError(400, message, param=name[:80], code="unknown_field")
    return described(served, entry, row.views(), layer=asked.get("layer", "any"), last=asked.get("last", str(_LAST)))


def described(served: Served, entry: Entry, views: Sequence[CacheView], *, layer: str, last: str) -> dict[str, Any]:
    """The answer's JSON.

    Args:
      served: the model.
      entry: the text.
      views: of its row (`SavedRow.views`).
      layer: as the query has it.
      last: likewise.

    Raises:
      ApiError: 400 for a layer or a number that there is not.
    """
    if not (last.isascii() and last.isdigit() and len(last) < 10 and int(last) <= _MOST):
        raise wrong("last", last, f"a whole number from 0 to {_MOST}")
    kinds = _kinds_of(served, views)
    chosen = _chosen(kinds, layer)
    ids, shares = np.array(entry.token_ids, np.int32), _shares(chosen, len(entry.token_ids))
    states = _states(chosen, len(ids), shares, layer)
    heads, layers = max(view.num_sets[1] for view in views), sum(len(kind.layers) for kind in kinds)
    found = {
        "object": "cache.view", "id": entry.names[-1] if entry.names else None, "model": served.name,
        **_numbers([kind for kind, _ in chosen]), "bytes": views[0].nbytes,
        "layers": layers, "heads": heads, "layer": layer,
    }  # fmt: skip
    if len(kinds) > 1:
        found["kinds"] = [{"layers": [*kind.layers], **_numbers([kind])} for kind in kinds]
    return found | {"tokens": list(_tokens(served, ids, states, shares if layers * heads > 1 else None, int(last)))}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Layers whose caches have one size."""

    layers: tuple[int, ...]  # the model's numbers; of one kind alone those that keep tokens of their own, or 0 for all
    size: int  # the most entries
    view: CacheView


def _kinds_of(served: Served, views: Sequence[CacheView]) -> list[_Kind]:
    sizes = served.sizes
    if not isinstance(sizes, MixedSizes):
        return [_Kind(tuple(range(views[0].num_sets[0])), sizes.cache_size, views[0])]
    return [_Kind(sizes.layers(i), part.cache_size, views[i]) for i, part in enumerate(sizes.parts)]


def _chosen(kinds: Sequence[_Kind], layer: str) -> list[tuple[_Kind, np.ndarray]]:
    """For each layer asked for, its kind and where its kept tokens stand, int[N, kept]."""
    of_layer = {
        number: (kind, kind.view.kept_positions[j if len(kind.view.kept_positions) > 1 else 0])
        for kind in kinds for j, number in enumerate(kind.layers)
    }  # fmt: skip
    if layer in ("any", "all"):
        return [of_layer[number] for number in sorted(of_layer)]
    if not (layer.isascii() and layer.isdigit() and len(layer) < 10 and int(layer) in of_layer):
        raise wrong("layer", layer, f"any, all, or a layer from 0 to {len(of_layer) - 1}")
    return [of_layer[int(layer)]]


def _numbers(kinds: Sequence[_Kind]) -> dict[str, int]:
    """Entries of a layer, averaged over these layers' kinds as the events of an answer have it (a kind a layer)."""
    views, n = [kind.view for kind in kinds], len(kinds)
    held, sinks, kept = (sum(getattr(view, name) for view in views) // n for name in ("held", "sinks", "kept"))
    size = -(-sum(kind.size for kind in kinds) // n)
    return {"seen": views[0].seen, "held": held, "size": size, "sinks": sinks, "kept": kept,
            "recent": held - sinks - kept}  # fmt: skip


def _shares(chosen: Sequence[tuple[_Kind, np.ndarray]], size: int) -> np.ndarray:
    """float[size]: of the layers that were asked for and their heads, the share that keeps each token of the text."""
    counts = np.zeros(size)
    for _, heads in chosen:
        for positions in heads:
            counts[np.unique(positions[(positions >= 0) & (positions < size)])] += 1 / len(heads)
    return np.round(counts / len(chosen), 9)  # a whole one is 1


def _states(chosen: Sequence[tuple[_Kind, np.ndarray]], size: int, shares: np.ndarray, layer: str) -> np.ndarray:
    """int[size]: places in `_STATES`. What was drawn last has yet to be taken up."""
    at, views = np.arange(size), [kind.view for kind, _ in chosen]
    pick: Any = min if layer == "all" else max
    recent, seen = pick(view.recent for view in views), views[0].seen
    # Where windows differ, what one layer keeps may still be in the window of another.
    held = np.zeros(size)
    for view in {id(view): view for view in views}.values():
        held[max(0, view.seen - view.recent) : view.seen] += sum(view is other for other in views)
    is_kept = shares > 0 if layer != "all" else shares + held / len(views) >= 1
    states = np.where(is_kept, _KEPT, _EVICTED)
    states[(at >= seen - recent) & (at < seen)] = _RECENT
    states[at < views[0].sinks] = _SINK
    states[at >= seen] = _NEW
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
