"""The rotary embedding of a config.json: read whole, or refused.

transformers reads some keys, overwrites others and passes over the rest. Here a section may hold the keys of its type
and nothing else, and what is said twice must be said alike; then what is read is what transformers computes.
"""

import math
from typing import Any

from sepjax.config import RopeConfig
from sepjax.hub.errors import HubError
from sepjax.hub.fields import Fields

_SECTIONS = ("rope_scaling", "rope_parameters")  # the older one first: transformers lets it replace the newer
_KINDS = {  # type -> keys that its section may hold besides those of any type
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (  # "finetuned" is a note
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    ),
}  # fmt: skip
_ANY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_BASES, _FRACTIONS = ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(
    fields: Fields,
    *,
    positions: int,
    base: str = "rope_theta",
    fraction: str | None = None,
    share: float = 1.0,
    default: float = 10_000.0,
) -> RopeConfig:
    """The rotary embedding, in the form of transformers 5 ("rope_parameters") or the older one.

    Args:
      fields: the whole config.json.
      positions: the context length by the other keys.
      base: the family's key of the base, outside of a section.
      fraction: the family's key of the rotated share of a head; None: it rotates whole heads.
      share: what that share is when no key says.
      default: what the base is when no key says.

    Raises:
      HubError: a type or key that is not known, or two keys that contradict each other; names them.
    """
    found = {}
    for name in _SECTIONS:
        if fields.values.get(name) is not None and not isinstance(fields.values[name], dict):
            fields.refuse(name, "expected a JSON object")
        if fields.values.get(name):
            found[name] = _read(fields, fields.section(name), positions, base, fraction, share, default)
    if len(found) == 2 and found[_SECTIONS[0]] != found[_SECTIONS[1]]:
        fields.refuse(_SECTIONS[0], f"contradicts {_SECTIONS[1]}={fields.values[_SECTIONS[1]]!r}; keep the right one")
    if not found:
        return _read(fields, Fields(fields.path, {}), positions, base, fraction, share, default)
    return next(iter(found.values()))


def _read(
    fields: Fields,
    section: Fields,
    positions: int,
    base: str,
    fraction: str | None,
    share: float,
    default: float,
) -> RopeConfig:
    kind = _kind(section)
    for name, value in section.values.items():
        if name not in _ANY_KIND + _KINDS[kind]:
            section.refuse(name, f"not a key of the rope type {kind!r}")
        if value is None and name in (*_ANY_KIND, "truncate"):
            section.refuse(name, "expected a value; leave the key out for the default")
    rope = RopeConfig(
        base=_agreed(fields, section, "rope_theta", base, _BASES, default),
        fraction=_agreed(fields, section, "partial_rotary_factor", fraction, _FRACTIONS, share),
        scaling="none" if kind == "default" else kind,
    )
    if fraction is None and rope.fraction != 1:
        section.refuse("partial_rotary_factor", "this architecture rotates whole heads")
    if kind != "default":
        rope.factor = section.number("factor")
        if rope.factor < 1:
            section.refuse("factor", "expected 1 or more: how many times longer the context became")
    if _ORIGINAL in _KINDS[kind]:
        rope.original_context = _original_context(fields, section, positions)
    if kind == "llama3":
        rope.low_frequency_factor = section.number("low_freq_factor")
        rope.high_frequency_factor = section.number("high_freq_factor")
        if rope.low_frequency_factor >= rope.high_frequency_factor:
            section.refuse("low_freq_factor", f"must be below high_freq_factor={rope.high_frequency_factor}")
    if kind == "yarn":
        _read_yarn(section, rope)
    return rope


def read_section(
    fields: Fields, section: Fields, *, positions: int, default: float, base: str = "rope_theta"
) -> RopeConfig:
    """The rotation of whole heads that one section says, with the keys outside of it; arguments as for `read_rope`."""
    return _read(fields, section, positions, base, None, 1.0, default)


def _kind(section: Fields) -> str:
    kinds = [section.values[name] for name in ("rope_type", "type") if section.values.get(name) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        section.refuse("rope_type", f"contradicts type={kinds[1]!r}; keep the right one")
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in _KINDS:
        name = "rope_type" if "rope_type" in section.values else "type"
        section.refuse(name, f"rope type {kind!r}; supported are {', '.join(_KINDS)}")
    return kind


def _agreed(
    fields: Fields, section: Fields, name: str, outside: str | None, spellings: tuple[str, ...], default: float
) -> float:
    """A number that the section, or one key outside of it, says. Keys that go unread must say the same."""
    for spelling in spellings:
        if spelling in fields.values and fields.values[spelling] is None:
            fields.refuse(spelling, "expected a number above 0; leave the key out for the default")
    value = default
    if name in section.values:
        value = section.number(name)
    elif outside is not None and outside in fields.values:
        value = fields.number(outside)
    for spelling in spellings:
        if spelling in fields.values and fields.number(spelling) != value:
            if name not in section.values and outside not in fields.values:
                fields.refuse(spelling, f"this architecture does not read it, and takes {value:g}")
            where = f"{section.prefix}{name}" if name in section.values else outside
            fields.refuse(spelling, f"contradicts {where}, which is {value:g}; keep the right one")
    return value


def _original_context(fields: Fields, section: Fields, positions: int) -> int:
    """The context before it was stretched: of the section or, in some files, beside it."""
    values = {f.integer(_ORIGINAL) for f in (section, fields) if f.values.get(_ORIGINAL) is not None}
    if len(values) == 2:
        fields.refuse(_ORIGINAL, f"contradicts {section.prefix}{_ORIGINAL}={section.values[_ORIGINAL]}")
    return values.pop() if values else positions


def _read_yarn(section: Fields, rope: RopeConfig) -> None:
    rope.beta_fast, rope.beta_slow = section.number("beta_fast", 32.0), section.number("beta_slow", 1.0)
    if rope.beta_slow >= rope.beta_fast:
        section.refuse("beta_slow", f"must be below beta_fast={rope.beta_fast:g}")
    rope.truncate = section.flag("truncate", True)
    scales = {name: section.number(name) for name in ("mscale", "mscale_all_dim") if section.values.get(name)}
    if section.values.get("attention_factor") is not None:
        rope.attention_factor = section.number("attention_factor")
        if scales:
            section.refuse("attention_factor", f"contradicts {', '.join(scales)}; keep one of them")
    elif len(scales) == 1:
        section.refuse(next(iter(scales)), "mscale and mscale_all_dim mean something together only")
    elif scales:
        part, whole = (0.1 * scales[name] * math.log(rope.factor) + 1 for name in ("mscale", "mscale_all_dim"))
        rope.attention_factor = part / whole


def rope_keys(rope: RopeConfig, whole_heads: str = "") -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json, which old and new versions of transformers read.

    Args:
      rope: the rotation.
      whole_heads: the family, in words, if it rotates whole heads only.

    Raises:
      HubError: transformers, or the family, has no such rotation.
    """
    if whole_heads and rope.fraction != 1:
        raise HubError(f"{whole_heads}: it rotates whole heads")
    keys: dict[str, Any] = {"rope_theta": rope.base, "rope_scaling": None}
    if rope.scaling != "yarn" and rope.attention_factor not in (0, 1):
        raise HubError(f"a rotary embedding with attention_factor={rope.attention_factor} must be of the type yarn")
    if rope.scaling != "none":
        scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
        if rope.scaling != "linear":
            scaling[_ORIGINAL] = rope.original_context
        if rope.scaling == "llama3":
            scaling |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
        if rope.scaling == "yarn":
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
            scaling |= {} if rope.truncate else {"truncate": False}
            scaling |= {"attention_factor": rope.attention_factor} if rope.attention_factor else {}
        keys["rope_scaling"] = scaling
    return keys
