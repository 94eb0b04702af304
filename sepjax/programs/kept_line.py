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

_OTHERS = "for another: --arm=... or --pattern=..."


def kept_line(settings: "Bounded", model: Transformer) -> str:
    """Of a program's settings; raises ConfigError for a cache that cannot be."""
    return f"the cache keeps {_what(model.config, settings.attention(model))}, {_why(settings, model)}"


def _what(config: ModelConfig, attention: AttentionConfig) -> str:
    names = {
        "separator": "separators",
        "watched": "watched tokens",
        "gated": "what a gate chooses",
        "fixed_interval": f"one of {attention.interval} tokens",
        "sink_window": "the newest tokens",
    }
    sizes, num_layers = bounded_sizes(config, with_own_window(attention, config)), config.num_layers
    keep = sum(sees_kept(attention, num_layers))
    where = f" in {keep} of {num_layers} layers" if keep < num_layers else ""
    on_average = " on average" if isinstance(sizes, MixedSizes) else ""
    return f"{names[attention.pattern]}{where}, {sizes.cache_size:,} entries a layer{on_average}"


def _why(settings: "Bounded", model: Transformer) -> str:
    source = locate(settings.path)
    file = kept.find(settings.path, source)
    is_ours = file is not None and file.parent == root() / "configs"
    stored = "" if file is None else f"@{file.stem}" if is_ours else str(file)
    if settings.told:
        aside = f" (in place of {stored}, which is there for this model)" if stored else ""
        return f"as --{settings.told[0]} asks{aside}"
    if getattr(settings, "resume", None) is not None:
        return "as the saved stream did"
    if stored:
        why = "was measured for this model (docs/keeping.md)" if is_ours else "is stored with the model"
        return f"as {stored} says, which {why}; {_OTHERS}"
    if kept.has_own_mask(source, model.attention):
        return f"as the model's own settings have it; {_OTHERS}"
    return (
        f"a default that was not measured for this model: sepjax layers --model={settings.path} --text=FOLDER finds "
        f"what it makes more of; {_OTHERS}"
    )
