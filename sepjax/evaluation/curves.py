"""Perplexity by position of several streams: a text table, a CSV file, a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

from sepjax.evaluation.streaming import StreamScore
from sepjax.pictures.canvas import PictureError, blank


def table(scores: Sequence[StreamScore]) -> str:
    """The scores as a text table; slots are means over tokens, and the most of any."""
    header = (
        f"{'pattern':<16}{'a':>4}{'s':>5}{'w':>6}{'c':>6}{'cache':>7}{'perplexity':>12}{'bits/byte':>11}{'slots':>8}"
        f"{'most':>6}"
        f"{'bytes':>12}{'KV kept':>9}{'tokens':>11}{'tokens/s':>11}{'compiled':>10}"
    )
    rows = [
        f"{s.pattern:<16}{s.num_sinks:>4}{s.max_separators:>5}{s.window_size:>6}{s.cache_size:>6}{s.cache_dtype:>7}"
        f"{s.perplexity:>12.3f}{s.bits_per_byte:>11.4f}{s.slots_held:>8.1f}{s.slots_most:>6}{s.cache_bytes:>12,}{s.kv_kept:>9.2%}"
        f"{s.tokens:>11,}{s.tokens_per_second:>11,.0f}{s.compilations:>10}"
        for s in scores
    ]
    return "\n".join([header, *rows])


def times(scores: Sequence[StreamScore]) -> str:
    """What was done before the streams, and how long each of them took, in a line."""
    first, streamed = scores[0], ", ".join(f"{s.seconds:.1f}" for s in scores)
    before = f"read and tokenised {first.tokenise_seconds:.1f}; compiled {first.compile_seconds:.1f}"
    return f"seconds: {before}; streamed {streamed}"


def label(score: StreamScore) -> str:
    """A stream's name in a picture or a file."""
    s = score
    kind = "" if s.cache_dtype == "model" else f" cache={s.cache_dtype}"
    return f"{s.pattern} a={s.num_sinks} s={s.max_separators} w={s.window_size} c={s.cache_size}{kind}"


def write_csv(path: Path, scores: Sequence[StreamScore]) -> None:
    """A row for each bucket of positions of each stream."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stream", "tokens_before_from", "tokens_before_below", "tokens", "perplexity"])
        for s in scores:
            writer.writerows([label(s), b.start, b.end, b.tokens, f"{b.perplexity:.6g}"] for b in s.buckets)


def write_png(path: Path, scores: Sequence[StreamScore]) -> None:
    """Perplexity over position, a line for each stream.

    Raises:
      PictureError: matplotlib is not installed, or no perplexity is a number.
    """
    if not any(0 < b.perplexity < float("inf") for s in scores for b in s.buckets):
        raise PictureError("no perplexity is a number")
    figure = blank(8.0, 4.5, "the curve")
    axes = figure.add_subplot()
    for s in scores:
        axes.plot([b.start for b in s.buckets], [b.perplexity for b in s.buckets], marker=".", label=label(s))
    axes.set(xscale="log", yscale="log", xlabel="tokens of the document before", ylabel="perplexity")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
