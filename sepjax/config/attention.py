"""Who attends to whom, and what caches keep: the section `attention` of a config, and its checks."""

import dataclasses
from typing import Any

from sepjax.config.checks import ConfigError
from sepjax.config.checks import at_least as _at_least
from sepjax.config.checks import one_of as _one_of

PATTERNS = ("separator", "dense", "sink_window", "fixed_interval", "gated")
SEPARATOR_POLICIES = ("punctuation", "paper", "ids")
TABLES = (".json", ".npy")  # files of ids that a command line may name in place of a policy
BOUNDED_PATTERNS = (*PATTERNS, "watched")  # "watched" needs a cache that has seen who looked at what
STREAM_POSITIONS = ("slot", "absolute")
KEPT_SETS = ("head", "model")
CACHE_DTYPES = ("model", "int8")
EVERYTHING = 2**30  # a window that no text fills


@dataclasses.dataclass(unsafe_hash=True)
class AttentionConfig:
    """Who attends to whom, and how much a cache may hold (METHOD letters in brackets)."""

    pattern: str = "separator"  # "separator" | "dense" | "sink_window" | "fixed_interval" | "gated" | "watched"
    num_sinks: int = 4  # [a] first tokens of each document, always visible
    window_size: int = 64  # [n, w] keys of the local window, the query itself included
    # one n per layer; empty: window_size everywhere. In bounded caches: layers of several sizes (docs/streaming.md)
    layer_windows: tuple[int, ...] = ()
    # layers that see kept tokens; the others see sinks and window. Empty: all (with a gate: those above it)
    kept_layers: tuple[int, ...] = ()
    layer_reach: tuple[int, ...] = ()  # one per layer: how far back it sees, kept keys included; 0: no limit
    # "punctuation" | "paper" (its nine) | "ids" (separator_ids); on the command line also a .json or .npy file of ids
    separators: str = "punctuation"
    separator_ids: tuple[int, ...] = ()  # the separators, for separators="ids"
    interval: int = 8  # [delta] for pattern="fixed_interval": keeps every delta-th token
    # For pattern="gated": layers below `gate_layer` see sinks and window, and a small network on their output scores
    # tokens; of every `gate_stretch` tokens of a document the best `gate_keep` stay visible for the layers above.
    gate_layer: int = 2  # for pattern="gated": the layers below see sinks and window only
    gate_stretch: int = 64  # for pattern="gated": tokens per stretch, of which the gate keeps the best
    gate_keep: int = 4  # for pattern="gated": tokens of each stretch that stay visible for the layers above
    # For pattern="watched", of bounded caches: a token that leaves the window is kept if it got a high attention
    # weight while it was there, in a layer of `watch_layers` (empty: the upper half); the best `max_separators` stay.
    watch_layers: tuple[int, ...] = ()  # for pattern="watched": layers whose weights count; empty: the upper half
    kept_set: str = "head"  # "head": each KV head of a watched layer keeps its own tokens; "model": one set for all
    # for pattern="watched": age in tokens from which attention weights count; all younger tokens get high ones
    watch_after: int = 16
    # tokens after which an attention weight (in bounded caches also a gate's score) counts half; 0: never
    watch_half_life: int = 4096
    # for pattern="watched": separators stay before all others; attention weights decide among them, and among the rest
    separators_first: bool = False
    max_separators: int = 64  # [s] separators (or other kept tokens) in a bounded cache
    cache_size: int = 0  # [c] entries of a bounded cache; 0: 2 * (a + s + w), if watched a little over a + s + w
    cache_dtype: str = "model"  # dtype of cached keys and values: "model" (the model's) | "int8" (about half the bytes)
    stream_positions: str = "slot"  # positions in a bounded cache: "slot" (in the cache) | "absolute" (in the text)
    keep_all_separators: bool = False  # bounded caches: never evict a separator; a full cache ends the stream
    document_mask: bool = True  # False: documents of a row see each other, as in the official code
    capacity: int = 0  # room for packed global keys in a row; 0: all, with mesh.context a quarter (decision 17)
    implementation: str | None = None  # implementation of separator_attention; None: the best for the device

    def in_words(self) -> str:
        """The pattern and its sizes, for people, with the letters of an arm."""
        kept_in = "" if self.cache_dtype == "model" else f" cache={self.cache_dtype}"
        if self.pattern == "dense":
            return self.pattern + kept_in
        cache = f" c={self.cache_size}" if self.cache_size else ""
        return f"{self.pattern} a={self.num_sinks} s={self.max_separators} w={self.window_size}{cache}{kept_in}"


def validate_attention(attention: AttentionConfig, num_layers: int) -> AttentionConfig:
    """Checks one attention section against the number of layers it is to serve."""
    _one_of("attention.pattern", attention.pattern, BOUNDED_PATTERNS)
    _one_of("attention.separators", attention.separators, SEPARATOR_POLICIES)
    _one_of("attention.stream_positions", attention.stream_positions, STREAM_POSITIONS)
    _one_of("attention.cache_dtype", attention.cache_dtype, CACHE_DTYPES)
    _at_least("attention.num_sinks", attention.num_sinks, 0)
    _at_least("attention.window_size", attention.window_size, 1)
    _at_least("attention.interval", attention.interval, 1)
    _at_least("attention.max_separators", attention.max_separators, 0)
    _at_least("attention.capacity", attention.capacity, 0)
    _at_least("attention.cache_size", attention.cache_size, 0)
    for n in attention.layer_windows:
        _at_least("attention.layer_windows", n, 1)
    if attention.layer_windows and len(attention.layer_windows) != num_layers:
        raise ConfigError(
            f"attention.layer_windows has {len(attention.layer_windows)} windows but the model has {num_layers} "
            "layers; give one window per layer, or leave it empty to use attention.window_size everywhere"
        )
    _validate_kept_layers(attention, num_layers)
    _validate_reach(attention, num_layers)
    if attention.separators == "ids" and not attention.separator_ids and attention.pattern in ("separator", "watched"):
        raise ConfigError('attention.separators="ids" needs attention.separator_ids, got none; list the token ids')
    if attention.pattern in ("gated", "watched") and attention.watch_half_life:
        _at_least("attention.watch_half_life", attention.watch_half_life, 256)
    if attention.pattern == "gated":
        _validate_gate(attention, num_layers)
    if attention.pattern == "watched":
        _validate_watch(attention, num_layers)
    held = attention.num_sinks + attention.max_separators + attention.window_size
    if attention.pattern == "sink_window":  # StreamingLLM: no separators, and the window may take all the rest
        held -= attention.max_separators + 1
    if attention.cache_size and held >= attention.cache_size:
        if attention.pattern == "sink_window":
            raise ConfigError(
                f"attention.cache_size={attention.cache_size} must be at least num_sinks + window_size = "
                f"{attention.num_sinks} + {attention.window_size} = {held + 1}; raise it or lower window_size"
            )
        raise ConfigError(
            f"attention.cache_size={attention.cache_size} must exceed num_sinks + max_separators + window_size = "
            f"{attention.num_sinks} + {attention.max_separators} + {attention.window_size} = {held}; "
            f"set cache_size to {held + 1} or more (0 picks {2 * held})"
        )
    return attention


def _validate_kept_layers(attention: AttentionConfig, num_layers: int) -> None:
    for layer in attention.kept_layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(f"attention.kept_layers has {layer}; the model's layers are 0 to {num_layers - 1}")
        if attention.pattern == "gated" and layer < attention.gate_layer:
            raise ConfigError(
                f"attention.kept_layers has {layer}, below gate_layer={attention.gate_layer}: nothing is kept before "
                "the gate has read; lower gate_layer or leave the layer out"
            )
    if attention.kept_layers and attention.pattern == "watched" and not attention.layer_windows:
        raise ConfigError(
            f"attention.kept_layers={attention.kept_layers} with watched tokens needs layer_windows: "
            "layers that keep nothing hold their window alone; set them, or leave kept_layers out and name "
            "the layers whose looks count in watch_layers"
        )
    if attention.kept_layers and attention.pattern in ("dense", "sink_window"):
        raise ConfigError(
            f"attention.kept_layers is for patterns that keep tokens, and pattern={attention.pattern!r} does not; "
            "leave it out, or set layer_windows"
        )


def _validate_reach(attention: AttentionConfig, num_layers: int) -> None:
    for n in attention.layer_reach:
        _at_least("attention.layer_reach", n, 0)
    if attention.layer_reach and len(attention.layer_reach) != num_layers:
        raise ConfigError(
            f"attention.layer_reach has {len(attention.layer_reach)} numbers but the model has {num_layers} layers; "
            "give one per layer, or leave it empty"
        )
    if attention.layer_reach and attention.pattern == "dense":
        raise ConfigError(
            'attention.layer_reach is not for pattern="dense", which sees everything: use "sink_window" and num_sinks=0'
        )


def _validate_gate(attention: AttentionConfig, num_layers: int) -> None:
    if not 0 <= attention.gate_layer < num_layers:
        raise ConfigError(
            f"attention.gate_layer={attention.gate_layer} must be 0 (the gate reads embeddings) to {num_layers - 1}: "
            f"of the model's {num_layers} layers one at least must see what the gate keeps"
        )
    _at_least("attention.gate_stretch", attention.gate_stretch, 1)
    _at_least("attention.gate_keep", attention.gate_keep, 0)
    if attention.gate_keep > attention.gate_stretch:
        raise ConfigError(
            f"attention.gate_keep={attention.gate_keep} of every gate_stretch={attention.gate_stretch} tokens are more "
            "than there are; lower gate_keep"
        )
    windows, kept = layer_windows(attention, num_layers, 0), sees_kept(attention, num_layers)
    narrowest = min(n for n, sees in zip(windows, kept, strict=True) if sees)
    if attention.gate_stretch > narrowest:
        raise ConfigError(
            f"attention.gate_stretch={attention.gate_stretch} exceeds the window {narrowest} of a gated layer: a token "
            "would leave it before its stretch is over and its fate is known; lower gate_stretch or widen the window"
        )


def _validate_watch(attention: AttentionConfig, num_layers: int) -> None:
    _one_of("attention.kept_set", attention.kept_set, KEPT_SETS)
    _at_least("attention.max_separators", attention.max_separators, 1)
    _at_least("attention.watch_after", attention.watch_after, 1)
    for layer in attention.watch_layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(f"attention.watch_layers has {layer}; the model's layers are 0 to {num_layers - 1}")
    windows, kept = attention.layer_windows or (attention.window_size,) * num_layers, sees_kept(attention, num_layers)
    narrowest = min(n for n, sees in zip(windows, kept, strict=True) if sees)
    if attention.watch_after >= narrowest:
        raise ConfigError(
            f"attention.watch_after={attention.watch_after} must be below the window of layers that keep, {narrowest}: "
            "looks count from that age on, and a token must be seen at it before it leaves the window"
        )
    idle = [layer for layer in attention.watch_layers if not kept[layer]]
    if idle:
        raise ConfigError(
            f"attention.watch_layers has {idle[0]}, which is none of kept_layers={attention.kept_layers}: its looks "
            "would decide nothing; leave it out"
        )
    if attention.keep_all_separators:
        raise ConfigError(
            'attention.keep_all_separators is for pattern="separator": of watched tokens only the best '
            f"max_separators={attention.max_separators} stay; leave it out"
        )


def layers_meant(attention: AttentionConfig, least: int) -> int:
    """How many layers a model has whose settings by layer these are: as many as are listed, else `least` or more."""
    named = (*attention.kept_layers, *attention.watch_layers, attention.gate_layer)
    return len(attention.layer_windows) or len(attention.layer_reach) or max(least, 1 + max(named))


def layer_windows(attention: AttentionConfig, num_layers: int, length: int) -> tuple[int, ...]:
    """The window n of every layer; a dense layer is a window of `length`, which must cover the whole sequence.

    A layer that reaches less far has no larger one.
    """
    if attention.pattern == "watched":
        raise ConfigError(
            'attention.pattern="watched" needs a bounded cache, which has seen who looked at what: sepjax generate '
            '--stream, sepjax chat, sepjax evaluate stream, or bounded=True; for whole rows use "sink_window", '
            '"separator" or "gated"'
        )
    if attention.pattern == "dense":
        return (length,) * num_layers
    windows = attention.layer_windows or (attention.window_size,) * num_layers
    if not attention.layer_reach:
        return windows
    return tuple(min(n, reach or n) for n, reach in zip(windows, attention.layer_reach, strict=True))


def keeps_everything(attention: AttentionConfig) -> bool:
    """Whether some layer sees all tokens that came, so that no cache of a fixed size can hold what it needs."""
    return attention.pattern == "dense" or attention.window_size >= EVERYTHING


def layer_reaches(attention: AttentionConfig, num_layers: int) -> tuple[int, ...] | None:
    """How many keys back every layer sees, kept ones included; None: no layer has an end of it."""
    if not any(attention.layer_reach):
        return None
    return tuple(n or EVERYTHING for n in attention.layer_reach)


def sees_kept(attention: AttentionConfig, num_layers: int) -> tuple[bool, ...]:
    """Of every layer whether it sees the tokens that are kept (separators, or a gate's choice), sinks aside."""
    below = attention.gate_layer if attention.pattern == "gated" else 0
    return tuple(i in attention.kept_layers if attention.kept_layers else i >= below for i in range(num_layers))


def under(attention: AttentionConfig, pattern: str, **changes: Any) -> AttentionConfig:
    """The settings under another pattern, for a comparison: layers picked for the own pattern's kept tokens go.

    So do windows by layer that go with what layers of a watched cache keep; those of other patterns are the model's.
    """
    own = {} if pattern == attention.pattern else {"kept_layers": ()}
    if own and attention.pattern == "watched":
        own["layer_windows"] = ()
    return dataclasses.replace(attention, pattern=pattern, **(own | changes))
