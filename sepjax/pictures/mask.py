"""Who sees whom in a text: the mask of a pattern beside dense attention's and StreamingLLM's, cell by cell.

draw_mask(Path("mask.png"), tokenizer, "One, two. Three.", AttentionConfig(window_size=4, num_sinks=2))
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sepjax.config import AttentionConfig, UserError, layer_reaches, layer_windows, sees_kept, under
from sepjax.data.tokenizer import Tokenizer
from sepjax.layout import build_layout
from sepjax.pictures.canvas import blank, plain
from sepjax.pictures.figures import COLOURS, save
from sepjax.separators import configured_table, flag_separators

HIDDEN, NEAR, KEPT, SINK = range(4)
_NAMES = {NEAR: "in the window", KEPT: "kept from before it", SINK: "sink"}
_SHADES = {HIDDEN: "#ffffff", NEAR: "#c8c8c8", KEPT: COLOURS[1], SINK: COLOURS[0]}  # also three greys in print
_LABELLED = 64  # tokens of a picture with their texts at the edges


class MaskError(UserError, ValueError):
    """A pattern or a text of which there is no mask to draw."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What every query of a text sees."""

    name: str
    kinds: np.ndarray  # int8[T, T]: of query i and key j HIDDEN, NEAR, KEPT or SINK

    @property
    def share(self) -> float:
        """Visible pairs over those of dense attention."""
        T = len(self.kinds)
        return float(np.count_nonzero(self.kinds)) / (T * (T + 1) / 2)


def who_sees_whom(
    tokenizer: Tokenizer, ids: list[int], attention: AttentionConfig, *, num_layers: int = 1, layer: int = 0
) -> Seen:
    """The mask of one layer over a text's ids.

    Raises:
      MaskError: a pattern whose mask is not told by the tokens, or a layer that there is not.
    """
    if attention.pattern in ("watched", "gated"):
        raise MaskError(
            f"what {attention.pattern!r} keeps is told by the model, not by the tokens: sepjax picture kept shows it; "
            "a mask is of separator, fixed_interval, sink_window or dense"
        )
    if not 0 <= layer < num_layers:
        raise MaskError(f"--layer={layer}: the model has layers 0 to {num_layers - 1}")
    T, tokens = len(ids), np.array([ids], np.int32)
    flags = flag_separators(tokens, np.arange(T)[None], configured_table(tokenizer, attention), attention)
    window = min(layer_windows(attention, num_layers, T)[layer], T)
    layout = build_layout(jnp.asarray(flags), window_size=window, num_sinks=attention.num_sinks)
    if not sees_kept(attention, num_layers)[layer]:
        layout = layout.with_most_far(attention.num_sinks)
    reaches = layer_reaches(attention, num_layers)
    if reaches is not None:
        layout = layout.with_reach(min(reaches[layer], T))
    far, near = (np.asarray(mask[0]) for mask in layout.as_masks())
    kinds = np.where(near, NEAR, np.where(far, np.where(np.arange(T) < attention.num_sinks, SINK, KEPT), HIDDEN))
    sizes = "" if attention.pattern == "dense" else f", window {window}, {attention.num_sinks} sinks"
    return Seen(f"{attention.pattern}{sizes}", kinds.astype(np.int8))


def draw_mask(
    path: Path,
    tokenizer: Tokenizer,
    text: str,
    attention: AttentionConfig,
    *,
    title: str = "",
    max_tokens: int = 48,
    num_layers: int = 1,
    layer: int = 0,
) -> list[Seen]:
    """Draws dense, StreamingLLM's and the pattern's own mask side by side; returns what is drawn.

    Args:
      path: ends in .png, .svg or .pdf.
      tokenizer: the model's.
      text: its first `max_tokens` tokens.
      attention: the pattern and its sizes.
      title: above the figure: model and text.
      max_tokens: at most; up to 64 have their texts at the edges.
      num_layers: of the model.
      layer: which layer's mask.

    Raises:
      MaskError: as `who_sees_whom`, or an empty text.
    """
    ids = tokenizer.encode(text, bos=True)[:max_tokens]
    if not tokenizer.encode(text):
        raise MaskError("the text is empty; give one of some sentences")
    others = [under(attention, pattern) for pattern in ("dense", "sink_window") if pattern != attention.pattern]
    where = {"num_layers": num_layers, "layer": layer}
    seen = [who_sees_whom(tokenizer, ids, x, **where) for x in (*others, attention)]
    figure = blank(4.4 * len(seen), 6.0, "the mask")
    labels = [_label(tokenizer, i) for i in ids] if len(ids) <= _LABELLED else []
    for number, one in enumerate(seen):
        _panel(figure.add_subplot(1, len(seen), number + 1), one, labels, is_first=number == 0)
    layers = f", layer {layer}" if num_layers > 1 and (attention.layer_windows or attention.kept_layers) else ""
    figure.suptitle(
        f"{plain(title) or 'Who sees whom'}{layers}: rows look at columns",
        fontsize=11,
        x=0.01,
        y=0.99,
        ha="left",
        va="top",
    )
    figure.get_layout_engine().set(h_pad=0.12)
    _legend(figure)
    save(figure, path)
    return seen


def _panel(axes: Any, seen: Seen, labels: list[str], *, is_first: bool) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([_SHADES[kind] for kind in (HIDDEN, NEAR, KEPT, SINK)])
    T = len(seen.kinds)
    axes.pcolormesh(
        np.arange(T + 1), np.arange(T + 1), seen.kinds, cmap=colours, vmin=HIDDEN, vmax=SINK, rasterized=T > _LABELLED,
        edgecolors="#ffffff" if T <= _LABELLED else "none", linewidth=0.3,
    )  # fmt: skip
    axes.plot([0, T, 0, 0], [0, T, T, 0], color="0.5", linewidth=0.8)  # all that is causal
    axes.set(xlim=(0, T), ylim=(T, 0), aspect="equal")
    axes.set_title(f"{seen.name}\n{seen.share:.0%} of the pairs", fontsize=9)
    axes.set_xticks(np.arange(len(labels)) + 0.5, labels, rotation=90, fontsize=5.5, family="monospace")
    if is_first:
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=5.5, family="monospace")
    else:
        axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_SHADES[kind], edgecolor="0.5", label=name) for kind, name in _NAMES.items()]
    patches.append(Patch(facecolor="#ffffff", edgecolor="0.5", label="not seen"))
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _label(tokenizer: Tokenizer, token: int) -> str:
    """The beginning of a token's text where white space is to be seen."""
    text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
    for white, sign in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥")):
        text = text.replace(white, sign)
    return plain(text[:12])
