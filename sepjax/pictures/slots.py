"""Entries that bounded caches hold while a text is read, beside dense attention's, which holds every token."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sepjax.config import AttentionConfig
from sepjax.data.tokenizer import Tokenizer
from sepjax.model.transformer import Transformer
from sepjax.pictures.canvas import plain
from sepjax.pictures.figures import COLOURS, DASHES, axes_of, save
from sepjax.pictures.kept import EVERYWHERE, kept_text

_MOMENTS = 2000  # at most: more than pixels show


def slots_held(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    arms: Mapping[str, AttentionConfig],
    *,
    max_tokens: int = 4096,
) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens seen and entries held, for each of `arms`, by its name; raises as `kept_text` does.

    A line through these points is what is held at every token: where a pass compacts, the moments before and after.
    """
    found = {}
    for name, attention in arms.items():
        picture = kept_text(model, tokenizer, text, attention, max_tokens=max_tokens, max_frames=_MOMENTS)
        points = [(frame.seen, frame.held) for frame in picture.frames]
        if picture.where == EVERYWHERE:  # caches of several sizes compact at moments of their own
            points = with_compactions(points, picture.cache_size)
        found[name] = ([seen for seen, _ in points], [held for _, held in points])
    return found


def with_compactions(points: Sequence[tuple[int, int]], cache_size: int) -> list[tuple[int, int]]:
    """(seen, held) after each pass, and where one compacts in between, before and after that.

    A cache grows by an entry a token until it is full, and compacts when the next one comes: once in a pass, unless
    each token evicts one, and then it stays full.
    """
    found = [(0, 0)]
    for seen, held in points:
        before, entries = found[-1]
        full = before + cache_size - entries  # tokens, when it is
        if held < entries + seen - before:
            found += [(full, cache_size)] if full > before else []
            if held < cache_size:
                found.append((full, held - (seen - full)))
        found.append((seen, held))
    return found[1:]


def draw_slots(path: Path, held: Mapping[str, tuple[list[int], list[int]]], title: str) -> None:
    """A line for each of what `slots_held` returns; `path` ends in .png, .svg or .pdf.

    Raises:
      FigureError: another ending.
    """
    figure, axes = axes_of(title)
    most, last = max(max(entries) for _, entries in held.values()), max(seen[-1] for seen, _ in held.values())
    top = min(1.35 * most, last)
    axes.plot([0, top], [0, top], color="0.4", linewidth=1, linestyle=":", label="dense: every token")
    for number, (name, (seen, entries)) in enumerate(held.items()):
        axes.plot(
            [0, *seen], [0, *entries], label=f"{plain(name)}: at most {max(entries):,}", linewidth=1.3,
            color=COLOURS[number % len(COLOURS)], linestyle=DASHES[number % len(DASHES)],
        )  # fmt: skip
    axes.set(xlabel="tokens seen", ylabel="entries held in a layer", xlim=(0, last), ylim=(0, 1.05 * top))
    axes.legend(frameon=False, loc="lower right")
    save(figure, path)
