"""The numbers that fix a cache: of a bounded one how many entries of each zone, and how they are rotated."""

import dataclasses

from sepjax.config import (
    EVERYTHING,
    AttentionConfig,
    ConfigError,
    ModelConfig,
    RopeConfig,
    keeps_everything,
    layer_reaches,
    sees_kept,
    with_own_window,
)
from sepjax.generation.cache.gated import Gated
from sepjax.generation.cache.watched import Watch
from sepjax.model.rope import layer_ropes

ALIGN = 64  # slots: what a tensor core's product takes at a time; other numbers are padded by copying
_COUNT = 2**30  # counters wrap near here, far from the end of int32


def bucket(size: int) -> int:
    """The least of 0, 64, 128, 256, ... that is at least `size`: few distinct shapes, so few compilations."""
    return 0 if size <= 0 else 64 << max(0, (size - 1) // 64).bit_length()


@dataclasses.dataclass(frozen=True)
class StreamSizes:
    """Limits of a `StreamingCache` (METHOD section 4), hashable: another value is another program. Made by `create`."""

    num_sinks: int  # a
    max_separators: int  # s
    window_size: int  # w
    cache_size: int  # c
    absolute: bool  # keys keep the positions of their tokens in the text; False: entry k has position k
    drops_separators: bool  # the oldest separator makes room when s are kept; False: that is an error of the host's
    count_wrap: int  # seen tokens are counted as high * count_wrap + low
    ropes: tuple[RopeConfig | None, ...]  # the distinct rotations of layers, and which one each has
    layer_ropes: tuple[int, ...]  # (`sepjax.model.rope.layer_ropes`); empty: all the same
    reach: tuple[int, ...]  # slots back that each layer sees, itself included; empty: all of them
    watch: Watch | None  # the second zone keeps watched tokens
    gate: Gated | None  # or what a gate chose; None, both: separators
    sees_kept: tuple[bool, ...]  # for each layer: whether it sees the second zone; empty: all do
    cache_dtype: str = "model"  # of keys and values (`sepjax.generation.cache.stored`)
    # Whether keys lie rotated by their slots' numbers: codes, which would be rounded again at every other turn. What
    # was saved without this field had codes of keys that were not rotated at all.
    turned_by_slot: bool = False

    @classmethod
    def create(cls, config: ModelConfig, attention: AttentionConfig) -> "StreamSizes":
        """The sizes that a config asks for.

        Raises:
          ConfigError: the pattern keeps everything, layers differ in their windows, the cache has no room for its
            zones, the model's positions are learned and so have an end, or layers see no further than a reach of
            their own (the model's window, or `layer_reach`) and positions are those of the text.
        """
        _check_served(config, attention)
        window = attention.layer_windows[0] if attention.layer_windows else attention.window_size
        separators = 0 if attention.pattern == "sink_window" else attention.max_separators
        held = attention.num_sinks + separators + window
        size = attention.cache_size or 2 * (attention.num_sinks + attention.max_separators + window)
        keeps_best = attention.pattern in ("watched", "gated")
        if keeps_best and not attention.cache_size:
            size = held + max(held // 16, 16)  # compacted often: what is still undecided is room that is not used
        if held > size:
            raise ConfigError(
                f"attention.cache_size={size} has no room for num_sinks + max_separators + window_size = "
                f"{attention.num_sinks} + {separators} + {window} = {held}; set cache_size to {held + 1} or more"
            )
        if attention.keep_all_separators and attention.pattern != "sink_window":  # as many as fit, none is ever dropped
            separators = size - attention.num_sinks - window
        reach = layer_reaches(with_own_window(attention, config), config.num_layers) or ()
        ropes, kinds = layer_ropes(config)
        period = {"fixed_interval": attention.interval, "gated": attention.gate_stretch}.get(attention.pattern, 1)
        sees = sees_kept(attention, config.num_layers)
        return cls(
            num_sinks=attention.num_sinks,
            max_separators=separators,
            window_size=window,
            cache_size=size,
            absolute=attention.stream_positions == "absolute",
            drops_separators=not attention.keep_all_separators,
            count_wrap=_COUNT - _COUNT % period,  # a multiple: `low` tells each interval-th token, and stretches
            ropes=ropes,
            layer_ropes=kinds,
            reach=reach if min(reach, default=EVERYTHING) <= size else (),  # no more than size + 1 are ever there
            watch=Watch.create(config, attention) if attention.pattern == "watched" else None,
            gate=Gated.create(config, attention) if attention.pattern == "gated" else None,
            sees_kept=() if all(sees) or not separators else sees,
            cache_dtype=attention.cache_dtype,
            turned_by_slot=attention.cache_dtype != "model" and attention.stream_positions != "absolute",
        )

    @property
    def main(self) -> "StreamSizes":
        """Itself: of caches with several sizes (`sepjax.generation.cache.mixed`), the part to look at."""
        return self

    @property
    def largest(self) -> int:
        """The most entries that any layer holds."""
        return self.cache_size

    @property
    def keeps_best(self) -> "Watch | Gated | None":
        """What decides by scores which entries of the second zone stay; None: the newest do."""
        return self.watch or self.gate

    @property
    def turns_in_place(self) -> bool:
        """Whether keys lie rotated by positions of their zones', and turn when these start again."""
        return not self.absolute and not self.turned_by_slot

    @property
    def turned_ends(self) -> tuple[int, ...]:
        """Where zones of slots end whose keys lie rotated each in its own way, all but the last; none: all in one."""
        return (self.num_sinks, self.num_sinks + self.max_separators) if self.turns_in_place else ()

    @property
    def slots(self) -> int:
        """C: sinks, separators, and a ring for the rest of c + 1 entries; if the best stay, for `ring_limit` of them.

        A gate's ring has the scores of a stretch besides whose first tokens are no entries any more.
        """
        least = self.cache_size + 1 + (0 if self.keeps_best else self.max_separators)
        least += self.gate.stretch - 1 if self.gate else 0
        if self.turned_by_slot:  # a ring as large as the sinks: their numbers are their tokens' in the ring, too
            least = max(least, 2 * self.num_sinks + self.max_separators)
        return -(-least // ALIGN) * ALIGN

    @property
    def ring(self) -> int:
        """R, slots of the ring."""
        return self.slots - self.num_sinks - self.max_separators

    @property
    def ring_limit(self) -> int:
        """Recent entries at which a zone of the best is compacted: what sinks and a full second zone leave of c + 1."""
        return self.cache_size + 1 - self.num_sinks - self.max_separators

    @property
    def chunk(self) -> int:
        """Tokens between two compactions of a full cache, aligned: a run of so many wastes least."""
        tokens = self.cache_size + 1 - self.num_sinks - self.max_separators - self.window_size
        if not self.max_separators:  # evictions do not end a run
            tokens = max(tokens, self.cache_size // 2)
        least = 16 if self.keeps_best else self.cache_size // 8  # a zone of the best is best compacted often
        return -(-max(tokens, least, 1) // 8) * 8

    @property
    def rotation_limit(self) -> int:
        """Positions at which rotations start again from 0: small angles are exact in float32."""
        return 2 * self.slots


def _check_served(config: ModelConfig, attention: AttentionConfig) -> None:
    """Raises ConfigError for what no bounded cache serves."""
    if keeps_everything(attention):
        raise ConfigError(
            'attention.pattern="dense" keeps every token, so a stream without end would need a cache without end; '
            'use "watched", "separator", "gated", "sink_window" or "fixed_interval", or, for an answer with '
            "max_new_tokens, a cache that grows: leave out what bounds it (bounded=True, --arm, --cache_size, "
            "--max_separators)"
        )
    if attention.kept_layers and attention.pattern == "watched":
        raise ConfigError(
            f"attention.kept_layers={attention.kept_layers} with watched tokens needs layer_windows; "
            "set them, or leave kept_layers empty and name the layers whose looks count in watch_layers"
        )
    if len(set(attention.layer_windows)) > 1:
        raise ConfigError(
            f"attention.layer_windows={attention.layer_windows}: one size for all layers has one window "
            "(sepjax.generation.cache.mixed.bounded_sizes has several)"
        )
    if config.position_embedding == "learned":
        raise ConfigError(
            f"a stream without end would pass the {config.max_positions} learned positions of the model; only "
            'models with model.position_embedding="rope" stream through a bounded cache'
        )
    if attention.stream_positions == "absolute" and any(with_own_window(attention, config).layer_reach):
        window = config.sliding_window
        who = f"a model with sliding_window={window} of its own" if window else f"layer_reach={attention.layer_reach}"
        raise ConfigError(
            f'attention.stream_positions="absolute" does not tell how old a kept token is, which {who} must know; '
            'use "slot"'
        )
    if attention.pattern == "gated" and not attention.max_separators:
        raise ConfigError(
            "attention.max_separators=0 leaves a bounded cache no room for what a gate keeps; raise it, or use "
            '"sink_window"'
        )
    if attention.pattern == "gated" and attention.keep_all_separators:
        raise ConfigError(
            "attention.keep_all_separators with a gate would end the stream when its zone is full; a gate's zone "
            "keeps the best max_separators: leave keep_all_separators off"
        )
