"""The rotary embeddings of a config.json whose layers slide or do not, and rotate accordingly (Gemma 3, OLMo 3)."""

from typing import Any

from sepjax.config import ModelConfig, RopeConfig
from sepjax.config.rope import same_rope
from sepjax.hub.decoder import FULL, SLIDING
from sepjax.hub.fields import Fields
from sepjax.hub.rope_fields import read_section, rope_keys


def read_ropes(
    fields: Fields, *, positions: int, base: float, sliding_base: float, local: str | None = None
) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers that do not slide, and of those that do, for `rope` and `sliding_rope`.

    Args:
      fields: the whole config.json: `rope_parameters` with a section a kind, or, of the former, `rope_scaling`.
      positions: the context length by the other keys.
      base: of layers that do not slide, where no key says.
      sliding_base: of those that do.
      local: the family's key of the latter, outside of a section; None: it has none.

    Raises:
      HubError: as `sepjax.hub.rope_fields.read_rope` does.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if fields.values.get(name) is not None and not isinstance(fields.values[name], dict):
            fields.refuse(name, "expected a JSON object")
    kinds, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    for name, value in kinds.values.items():
        if name not in (FULL, SLIDING) or not isinstance(value, dict | None):
            kinds.refuse(name, f"expected an object for each of {FULL} and {SLIDING}")
    if "type" in scaling.values and "rope_type" not in scaling.values:
        fields.refuse("rope_scaling", "transformers passes over its type under this name; call it rope_type")
    section = kinds.section(FULL)
    if scaling.values and section.values and section.values != scaling.values:
        fields.refuse("rope_scaling", f"contradicts rope_parameters.{FULL}={section.values!r}; keep the right one")
    outside = Fields(fields.path, {k: v for k, v in fields.values.items() if k != local})
    full = read_section(outside, scaling if scaling.values else section, positions=positions, default=base)
    section = kinds.section(SLIDING)
    outside, where = Fields(fields.path, {}), {}
    if local is not None and local in fields.values:
        outside, where = Fields(fields.path, {local: fields.values[local]}), {"base": local}
        if "rope_theta" in section.values and section.number("rope_theta") != fields.number(local):
            fields.refuse(local, f"contradicts {section.prefix}rope_theta={section.values['rope_theta']!r}")
    sliding = read_section(outside, section, positions=positions, default=sliding_base, **where)
    return full, same_rope() if sliding == full else sliding


def ropes_keys(config: ModelConfig, name: str, *, local: str | None = None) -> dict[str, Any]:
    """`rope_parameters` of a config.json, and the same as older versions of transformers read it, where they can.

    Args:
      config: the model's.
      name: the family, in words.
      local: as in `read_ropes`.

    Raises:
      HubError: transformers has no such rotation.
    """
    slides = config.sliding_rope if config.sliding_rope.base else config.rope
    full, sliding = _section(config.rope, name), _section(slides, name)
    keys = {"rope_parameters": {FULL: full, SLIDING: sliding}}
    if config.sliding_window and slides.scaling != "none":
        return keys  # what slides is never scaled there
    if local is None and config.sliding_window and slides.base != config.rope.base:
        return keys  # one base serves both kinds there
    keys |= {"rope_theta": config.rope.base} | ({} if local is None else {local: slides.base})
    return keys if config.rope.scaling == "none" else keys | {"rope_scaling": full}


def _section(rope: RopeConfig, name: str) -> dict[str, Any]:
    keys = rope_keys(rope, name)
    return (keys["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": keys["rope_theta"]}
