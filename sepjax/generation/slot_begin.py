"""A request that slots take on: what is checked, and what the host's side of its row is."""

from sepjax.config import ConfigError
from sepjax.generation.packed import Bytes
from sepjax.generation.prepared import Prepared
from sepjax.generation.readers import BoundedReader
from sepjax.generation.row import Row, RowSettings
from sepjax.generation.slot_arrival import told_of
from sepjax.generation.slot_request import Slot, SlotRequest
from sepjax.separators import warn_of_few_in


def slot_of(prepared: Prepared, reader: BoundedReader, arrivals: Bytes, request: SlotRequest, number: int) -> Slot:
    """A request as it waits for a row. See `Slots.submit` for what it raises.

    Args:
      prepared: the model.
      reader: of its bounded caches.
      arrivals: how the device is told of rows that begin.
      request: what is asked for.
      number: that its events bear.
    """
    tokenizer, resume = prepared.tokenizer, request.resume
    settings = RowSettings.create(
        tokenizer, stop=request.stop, stop_token_ids=request.stop_token_ids, stop_at_eos=request.stop_at_eos,
        max_new_tokens=request.max_new_tokens, max_repeats=request.max_repeats, logprobs=request.logprobs,
        top_logprobs=request.top_logprobs, min_new_tokens=request.min_new_tokens,
    )  # fmt: skip
    pending = request.to_be_read(tokenizer)
    seen, continues = (0 if resume is None else resume.seen), True
    reader.check(seen, [pending], request.max_new_tokens)
    if request.prompt is not None:
        warn_of_few_in(pending, prepared.table, prepared.attention, "a prompt")
        continues = any(map(tokenizer.token_bytes, pending))
    absolute = reader.sizes.absolute
    if resume is not None:
        resume.check(reader)
        if resume.is_full:
            raise ConfigError("the row to go on with has a full cache (keep_all_separators); begin another one")
    row = Row(tokenizer, settings, continues=continues, seen=seen, has_end=absolute)
    if request.prompt is None and resume is not None:
        row.restore(resume.row)
        if row.finish_reason is not None:
            raise ConfigError(f"the row to go on with has ended ({row.finish_reason}); give it a prompt")
    told, own_ends = told_of(prepared, reader, arrivals, request, settings, pending)
    slot = Slot(number, request, row, pending, told, own_ends)
    slot.has_drawn = resume is not None and resume.has_drawn
    return slot
