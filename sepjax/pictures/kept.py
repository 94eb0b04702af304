"""Which tokens of a text a bounded cache keeps, and when it let the others go: in a terminal, or as one HTML file.

    picture = kept_text(model, tokenizer, text)
    print(picture.terminal())                        # as it stands at the end
    Path("kept.html").write_text(picture.html())     # with a slider over time

A frame is a moment after a pass over some tokens. Each token seen so far is a sink, recent (in the window, or not yet
compacted), kept by so many of the sets that layers and heads keep, or gone.
"""

import codecs
import dataclasses
import html
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.generation.cache.mixed import BoundedSizes, MixedSizes, bounded_sizes, empty_cache
from sepjax.generation.cache.view import CacheView, of_row
from sepjax.generation.device_loop import make_consume
from sepjax.generation.prepared import Prepared
from sepjax.model.transformer import Transformer

SINK, RECENT, GONE = "s", "r", "0"  # in a frame's states; "1" to "9": kept, by so many ninths of the sets
_SHADES = 9
EVERYWHERE = "layer and head"


class EmptyTextError(UserError, ValueError):
    """A text without tokens."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """What is held at one moment."""

    seen: int  # tokens so far
    held: int  # entries
    nbytes: int
    states: str  # a character for each token so far: SINK, RECENT, GONE or "1" to "9"

    @classmethod
    def of(cls, view: CacheView) -> "Frame":
        """The frame of a row's view."""
        sets = view.kept_positions.reshape(math.prod(view.num_sets), view.kept)
        count = np.zeros(view.seen, int)
        for positions in sets:
            count[positions] += 1
        shades = np.where(count > 0, np.maximum(count * _SHADES // len(sets), 1), 0)
        states = np.array([str(x) for x in shades.tolist()], "<U1")
        states[view.seen - view.recent :] = RECENT
        states[: view.sinks] = SINK
        return cls(view.seen, view.held, view.nbytes, "".join(states.tolist()))


@dataclasses.dataclass(frozen=True)
class KeptText:
    """Made by `kept_text`."""

    title: str  # pattern and sizes
    tokens: tuple[str, ...]  # their texts; one that ends within a character has what was whole before
    frames: tuple[Frame, ...]  # in order of time; the last has seen all tokens
    cache_size: int
    where: str = EVERYWHERE  # that has so many entries

    def terminal(self, frame: int = -1) -> str:
        """One frame in ANSI colours: sinks underlined, kept tokens on colour, recent ones plain, the others faint."""
        shown = self.frames[frame]
        out = [f"\x1b[1m{self.title}\x1b[0m", self.caption(shown), ""]
        codes = {SINK: "4;1", RECENT: "0", GONE: "2"}
        text = [
            f"\x1b[{codes.get(state) or _shade(state)}m{piece}\x1b[0m"
            for piece, state in zip(self.tokens, shown.states, strict=False)
        ]
        return "\n".join([*out, "".join(text).replace("\t", "    ")])

    def caption(self, frame: Frame) -> str:
        """The numbers of a frame."""
        kept = sum(state not in (SINK, RECENT, GONE) for state in frame.states)
        places = f"{frame.held:,} entries of {frame.seen:,} tokens ({frame.held / max(frame.seen, 1):.0%})"
        where = (
            f"{kept:,} tokens from before the window kept somewhere" if kept else "nothing kept from before the window"
        )
        return f"{places} in each {self.where}, {where}; {frame.nbytes:,} bytes"

    def html(self) -> str:
        """One self-contained page: the text, a slider over time, light and dark, legible in print."""
        page = Path(__file__).with_name("kept.html").read_text(encoding="utf-8")
        data = {
            "tokens": self.tokens,
            "frames": [[x.seen, x.states, self.caption(x)] for x in self.frames],
        }
        # "</script>" and "<!--" would end or hide the data, whatever a text says.
        encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        return page.replace("{{title}}", html.escape(self.title)).replace("{{data}}", encoded)


def _shade(state: str) -> str:
    """Black on one of three yellows of the 256 colours."""
    return f"30;48;5;{(230, 228, 220)[(int(state) - 1) * 3 // _SHADES]}"


def kept_text(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    attention: AttentionConfig | None = None,
    *,
    max_tokens: int = 4096,
    max_frames: int = 120,
) -> KeptText:
    """Reads a text through a bounded cache and looks at it after every pass.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      text: what is read.
      attention: the pattern and its sizes; None: what its bounded caches keep by default.
      max_tokens: of the text, at most.
      max_frames: moments, at most; the last is always one.

    Raises:
      EmptyTextError: an empty text.
      ConfigError: a pattern that no bounded cache serves (`bounded_sizes`).
    """
    of = Prepared.create(model, tokenizer, attention or model.kept)
    sizes = bounded_sizes(of.config, of.attention)
    ids = tokenizer.encode(text, bos=True)[:max_tokens]
    if not tokenizer.encode(text):
        raise EmptyTextError("the text is empty; give one of some hundred words")
    frames = _frames(of, sizes, ids)
    every = -(-len(frames) // max_frames)
    return KeptText(
        title=_title(of.attention, sizes),
        tokens=tuple(_pieces(tokenizer, ids)),
        frames=tuple(frames[::-1][::every][::-1]),
        cache_size=sizes.main.cache_size,
        where=_where(sizes),
    )


def _frames(of: Prepared, sizes: BoundedSizes, ids: list[int]) -> list[Frame]:
    consume = make_consume(of.graph, of.attention)
    cache: Any = empty_cache(of.config, 1, sizes, by_layer=True)
    cache, logits = of.placed(cache), of.placed(jnp.zeros((1, of.config.vocab_size), jnp.float32))
    nbytes, frames, at = cache.nbytes, [], 0
    while at < len(ids):
        tokens, left = np.zeros((1, sizes.chunk), np.int32), min(sizes.chunk, len(ids) - at)
        tokens[0, :left] = ids[at : at + left]
        cache, logits, taken = consume(of.params, cache, logits, tokens, np.array([left], np.int32), of.table_on_device)
        at += int(np.asarray(taken)[0])
        frames.append(Frame.of(of_row(cache, at, nbytes)))
    return frames


def _where(sizes: BoundedSizes) -> str:
    if isinstance(sizes, MixedSizes):
        return f"of layers {', '.join(map(str, sizes.layers(0)))}, others in others"
    return "layer that keeps, fewer in others" if sizes.sees_kept else EVERYWHERE


def _title(attention: AttentionConfig, sizes: BoundedSizes) -> str:
    kept = f", {sizes.max_separators} kept" if sizes.max_separators else ""
    zones = f"{sizes.num_sinks} sinks{kept}, window {sizes.window_size}"
    return f"{attention.pattern}: {zones}, at most {sizes.main.cache_size} held"


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> Any:
    """The text of each token; what ends within a character goes to the token that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(tokenizer.token_bytes(i)) for i in ids]
    return [*pieces[:-1], pieces[-1] + decoder.decode(b"", final=True)]
