"""The line that says what a bounded cache keeps, why, and how to have another."""

from typing import TYPE_CHECKING

from sepjax import kept
from sepjax.config import AttentionConfig, ModelConfig, sees_kept, with_own_window
from sepjax.config.checkout import root
from sepjax.generation.cache.mixed import MixedSizes, bounded_sizes
from sepjax.loading import locate
from sepjax.model.transformer import Transformer

if TYPE_CHECKING:
    from sepjax.programs.writing import Bounded

_CHANGE = "change with --arm=... or --pattern=..."


def kept_line(settings: "Bounded", model: Transformer) -> str:
    """Of a program's settings; raises ConfigError for a cache that cannot be."""
    return f"KV cache: {_what(model.config, settings.attention(model))} ({_why(settings, model)})"


def _what(config: ModelConfig, attention: AttentionConfig) -> str:
    chosen = {
        "separator": "separators",
        "watched": "watched tokens, those with the highest attention weights",
        "gated": "the tokens that its gate picks",
        "fixed_interval": f"one token in {attention.interval}",
        "sink_window": "",
    }[attention.pattern]
    sizes, num_layers = bounded_sizes(config, with_own_window(attention, config)), config.num_layers
    keep = sum(sees_kept(attention, num_layers))
    where = f"in {keep} of {num_layers} layers " if keep < num_layers else ""
    on_average = " on average" if isinstance(sizes, MixedSizes) else ""
    tokens = f"recent tokens and {where}{chosen}" if chosen else "recent tokens only"
    return f"{sizes.cache_size:,} entries per layer{on_average}, for {tokens}"


def _why(settings: "Bounded", model: Transformer) -> str:
    source = locate(settings.path)
    file = kept.find(settings.path, source)
    is_ours = file is not None and file.parent == root() / "configs"
    stored = "" if file is None else f"@{file.stem}" if is_ours else str(file)
    if settings.told:
        aside = f", replacing {stored}, which is stored for this model" if stored else ""
        return f"set by --{settings.told[0]}{aside}"
    if getattr(settings, "resume", None) is not None:
        return "as in the saved stream"
    if stored:
        why = "which measured best for this model: docs/keeping.md" if is_ours else "stored with the model"
        return f"set by {stored}, {why}; {_CHANGE}"
    if kept.has_own_mask(source, model.attention):
        return f"the model's own settings; {_CHANGE}"
    return (
        f"the default, not measured for this model: sepjax layers --model={settings.path} --text=FOLDER searches for a "
        f"better one; {_CHANGE}"
    )
