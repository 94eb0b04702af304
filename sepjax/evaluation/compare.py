"""Perplexity of several patterns on the same tokens: at equal KV or pairs, by slice, with errors paired over documents.

`sepjax.evaluation.slices` says which slices there are, and what is recovered of the far one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sepjax.config import AttentionConfig, ConfigError, layer_windows, nearest, under, validate_attention
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.arms import Arm, distances, plain_arms
from sepjax.evaluation.equal import window_of_equal
from sepjax.evaluation.perplexity import TextWindows, WindowLosses, score_windows, token_windows
from sepjax.evaluation.slices import References, ScoredTokens, Slice, by_position, sliced, spread
from sepjax.model.transformer import Transformer

type Load = Callable[[str], tuple[Transformer, Tokenizer]]  # from an arm's `model`


@dataclasses.dataclass(frozen=True)
class Score:
    """How well one pattern predicts a set of documents. Errors are one standard error, paired over documents."""

    arm: str
    pattern: str
    window_size: int  # n; for per-layer windows the largest
    perplexity: float  # per token
    perplexity_error: float | None
    window_perplexity: float  # the mean of each window's own, a convention of other programs; always larger
    bits_per_byte: float  # of the UTF-8 text
    baseline: str  # the arm that differences are from
    difference: float  # nats a token more than the baseline
    difference_error: float | None  # None: of a single window
    kv_kept: float  # keys of each window's last row over its length, averaged over layers and windows
    layer_kept: tuple[float, ...]  # the same of each layer
    keys: float  # that a window's last row sees, summed over all layers, averaged over windows: counted
    attention_fraction: float  # visible over causal pairs, averaged over layers
    near: int  # tokens: see `sepjax.evaluation.slices`
    far: int
    slices: tuple[Slice, ...]
    positions: tuple[Slice, ...]
    tokens: int  # scored
    bytes: int
    documents: int
    windows: int
    tokens_per_second: float  # after compilation
    model: str  # of arms that have their own
    attention: AttentionConfig


def score_patterns(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    attentions: Sequence[AttentionConfig],
    *,
    length: int,
    batch_size: int = 8,
    max_tokens: int = 0,
    bos: bool = True,
) -> list[Score]:
    """`score_arms` of plain patterns, the first of which is the baseline."""
    windows = token_windows(tokenizer, documents, length, bos=bos, max_tokens=max_tokens)
    return score_arms(
        lambda _: (model, tokenizer), windows, plain_arms(attentions), length=length, batch_size=batch_size
    )


def score_arms(
    load: Load,
    windows: TextWindows,
    arms: Sequence[Arm],
    *,
    length: int,
    batch_size: int = 8,
    baseline: str = "",
    near: int = 0,
    far: int = 0,
) -> list[Score]:
    """Scores the same windows under each arm.

    Args:
      load: gives the model and tokenizer of an arm's `model`, "" for the one that is evaluated.
      windows: from `token_windows`.
      arms: what to compare, by names that differ. "n=kv:NAME" has the arm NAME before it.
      length: T, tokens of a row.
      batch_size: rows of a forward pass, at most.
      baseline: the arm that differences are from; "": the first.
      near: tokens, the end of the slice `near`; 0: the smallest window.
      far: tokens, where the slice `far` begins; 0: the largest window below T.

    Raises:
      ConfigError: no such baseline, near exceeds far, or settings that do not fit the model.
      TextError: a learned position table is shorter than `length`.
    """
    names = [arm.name for arm in arms]
    first = baseline_index(names, baseline)
    loaded = functools.lru_cache(maxsize=1)(load)
    scores: list[WindowLosses] = []
    for arm in arms:
        model, tokenizer = loaded(arm.model)
        if arm.model and tokenizer.token_texts() != load("")[1].token_texts():
            raise ConfigError(f"arm {arm.name!r}: model={arm.model} has another tokenizer; arms score the same tokens")
        attention = _fitted(arm, tokenizer, windows, dict(zip(names, scores, strict=False)))
        attention = validate_attention(attention, model.config.num_layers)
        scores.append(score_windows(model, tokenizer, windows, attention, length=length, batch_size=batch_size))
    near, far = distances([x.attention for x in scores], len(scores[0].kept), length, near, far)
    refer = references(arms, [x.kv_kept for x in scores], first)
    tokens = ScoredTokens.create(
        [w[:-1] for w in windows.ids], [w[1:] for w in windows.ids], windows.documents.tolist()
    )
    if windows.scored is not None:
        tokens = tokens.where(np.concatenate(windows.scored))
    return [_score(arms, scores, i, refer[i], windows, tokens, near, far) for i in range(len(arms))]


def at_equal_kv(attention: AttentionConfig, density: float, equal: str = "kv") -> list[Arm]:
    """Dense, separators, StreamingLLM and fixed intervals; the last two with windows as costly as the separators.

    Args:
      attention: the settings of the separators; the others take their sinks, and a fixed interval takes every
        `interval`-th token, the number nearest to the separators' own density.
      density: separators a token.
      equal: "kv": they keep as many keys; "pairs": they compute as many (query, key) pairs.
    """
    interval = max(1, round(1 / max(density, 1e-3)))
    plain = dataclasses.replace(attention, cache_size=0, interval=interval)
    own, others = ("dense", "separator"), ("sink_window", "fixed_interval")
    return [Arm(x, under(plain, x)) for x in own] + [
        Arm(x, under(plain, x, layer_windows=()), equal=(equal, "separator")) for x in others
    ]


def _fitted(arm: Arm, tokenizer: Tokenizer, windows: TextWindows, scores: dict[str, WindowLosses]) -> AttentionConfig:
    """The arm's settings, with the window that makes it equal to another, if it is to be."""
    kind, name = arm.equal
    if not kind:
        return arm.attention
    want = scores[name].kv_kept if kind == "kv" else scores[name].attention_fraction
    return window_of_equal(arm.attention, tokenizer, windows.ids, kind, want)


def baseline_index(names: Sequence[str], baseline: str) -> int:
    """Which of the arms the baseline is; "": the first. Raises `ConfigError` for none of them."""
    if baseline and baseline not in names:
        raise ConfigError(
            f"--baseline={baseline!r} is not one of the arms {', '.join(names)}{nearest(baseline, names)}"
        )
    return names.index(baseline) if baseline else 0


def references(arms: Sequence[Arm], kept: Sequence[float], baseline: int) -> list[References]:
    """What each arm is held against: the plain window whose memory is nearest to its own, and dense.

    A plain window is the same in all layers; one with others in some layers is a hybrid, which is held against it.
    Dense is the first arm of that pattern, or of that name: a stream's largest cache may stand for it.
    """
    whole = [i for i, arm in enumerate(arms) if "dense" in (arm.attention.pattern, arm.name)]
    plain = [
        i
        for i, arm in enumerate(arms)
        if arm.attention.pattern == "sink_window" and len(set(arm.attention.layer_windows)) <= 1 and i not in whole
    ]
    return [
        References(
            baseline,
            dense=whole[0] if whole else None,
            window=min(plain, key=lambda i: abs(kept[i] - own)) if plain else None,
        )
        for own in kept
    ]


def _score(
    arms: Sequence[Arm],
    scores: Sequence[WindowLosses],
    this: int,
    refer: References,
    windows: TextWindows,
    tokens: ScoredTokens,
    near: int,
    far: int,
) -> Score:
    x, lengths = scores[this], windows.lengths
    losses = [score.nll for score in scores]
    slices = sliced(tokens, losses, this, refer, near, far)
    whole, nll, counts = slices[0], np.bincount(tokens.row, weights=x.nll), np.bincount(tokens.row)
    perplexity, error = math.exp(min(whole.loss, 700.0)), spread(whole)
    return Score(
        arm=arms[this].name,
        pattern=x.attention.pattern,
        window_size=max(layer_windows(x.attention, len(x.kept), int(lengths.max()))),
        perplexity=perplexity,
        perplexity_error=None if error is None else perplexity * error,
        window_perplexity=float(np.mean(np.exp(np.minimum(nll / counts, 700.0)))),
        bits_per_byte=float(nll.sum()) / math.log(2) / windows.num_bytes,
        baseline=arms[refer.baseline].name,
        difference=whole.difference,
        difference_error=whole.difference_error,
        kv_kept=x.kv_kept,
        layer_kept=tuple(x.kept.mean(axis=1).tolist()),
        keys=float(np.mean(np.sum(x.kept * lengths, axis=0))),
        attention_fraction=x.attention_fraction,
        near=near,
        far=far,
        slices=slices,
        positions=by_position(tokens, losses, this, refer),
        tokens=len(x.nll),
        bytes=windows.num_bytes,
        documents=len(np.unique(windows.documents)),
        windows=len(lengths),
        tokens_per_second=len(x.nll) / x.seconds,
        model=arms[this].model,
        attention=x.attention,
    )
