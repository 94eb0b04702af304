"""What the device is told of a row that begins."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sepjax.array_typing import UInt8
from sepjax.config import ConfigError
from sepjax.generation.packed import Bytes
from sepjax.generation.prepared import Prepared
from sepjax.generation.prompts import checked_seeds
from sepjax.generation.readers import BoundedReader
from sepjax.generation.row import Row, RowSettings
from sepjax.generation.sampling import Sampling
from sepjax.generation.slot_request import SlotRequest
from sepjax.generation.slot_rows import Arrival, Wishes

ENDS = 16  # end tokens that the device knows of; the host knows all
_MOST_COUNTED = 2**30  # new tokens that the device counts


def told_of(
    prepared: Prepared, reader: BoundedReader, arrivals: Bytes, request: SlotRequest, settings: RowSettings,
    pending: Sequence[int],
) -> tuple[UInt8[np.ndarray, "_"], bool]:  # fmt: skip
    """Bytes of what the device is told; whether the row may be saved after an end that the device does not know.

    Raises ConfigError for a seed out of range, a bias of a token that there is not, or more end tokens than the device
    can hold back (`min_new_tokens`).
    """
    resume, new, ends = request.resume, settings.max_new_tokens, sorted(settings.ends.eos | settings.ends.stop)
    limit = -1 if new is None or new > _MOST_COUNTED else new  # the host counts, too
    least = settings.min_new_tokens
    if least and len(ends) > ENDS:
        raise ConfigError(f"min_new_tokens={least} goes with up to {ENDS} end tokens in slots, got {len(ends)}")
    checked_seeds([request.seed or 0])
    seed = (request.seed or 0) if resume is None or request.seed is not None else None
    told = arrival(
        prepared, request.sampling, ends, limit, min(least, _MOST_COUNTED), settings.logprobs,
        settings.top_logprobs > 0, seed, is_reading=bool(pending),
    )  # fmt: skip
    most = (0 if resume is None else resume.seen) + len(pending) + (new or _MOST_COUNTED)
    own = settings.stop or settings.max_repeats or len(ends) > ENDS or (limit < 0 and new is not None)
    own = own or reader.form.ends_when_stuck or (reader.sizes.absolute and most >= Row.LAST_POSITION)
    return arrivals.of_host(told), bool(own) and request.keep


def arrival(
    prepared: Prepared, sampling: Sampling | None, ends: Sequence[int], limit: int, least: int, logprobs: bool,
    top_logprobs: bool, seed: int | None, *, is_reading: bool,
) -> Arrival:  # fmt: skip
    """What a row that begins is told.

    Args:
      prepared: the model.
      sampling: how it draws; None: the best token.
      ends: tokens that end it; the device knows the first 16.
      limit: tokens that it draws; -1: no limit.
      least: tokens before which it does not end by one.
      logprobs: whether it asks how probable its tokens were.
      top_logprobs: whether it asks for the most probable ones.
      seed: of its draws; None: those of a saved row go on.
      is_reading: whether it has something to read first.

    Raises ConfigError: a bias of a token that there is not.
    """
    known = np.full((1, ENDS), -1, np.int32)
    known[0, : len(ends[:ENDS])] = ends[:ENDS]
    asks: Any = (np.array([bool(x)]) for x in (logprobs, top_logprobs))
    sampling = (sampling or Sampling.create()).check(prepared.tokenizer.vocab_size)
    given: dict[str, Any] = {x.name: np.asarray(getattr(sampling, x.name))[None] for x in dataclasses.fields(Sampling)}
    sampling = Sampling(**given)  # of one row
    limits: Any = np.full(1, limit, np.int32)
    early: Any = np.full(1, least, np.int32)
    wishes = Wishes(sampling, known, limits, *asks, min_new_tokens=early)  # pyright: ignore[reportArgumentType]
    return Arrival(wishes, np.array([seed or 0], np.uint32), np.array([seed is not None]), np.array([is_reading]))
