"""What was saved by an older version, which did not have all the fields of now: an absent field has its default."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


def completed(saved: Any, like: Any) -> Any:
    """Saved settings with the fields that they lack, where these have defaults; also within other settings.

    Args:
      saved: of JSON; what is not settings, or a list of them, comes back as it is.
      like: settings of now, a dataclass, or several of them.
    """
    if isinstance(saved, Mapping) and dataclasses.is_dataclass(like):
        absent = {name: value for name, value in _defaults(like).items() if name not in saved}
        return absent | {name: completed(value, getattr(like, name, None)) for name, value in saved.items()}
    if isinstance(saved, list) and isinstance(like, tuple) and len(saved) == len(like):
        return [completed(value, one) for value, one in zip(saved, like, strict=True)]
    return saved


def told(settings: Any) -> Any:
    """Settings as plain JSON, those that are at their defaults left out: the same after a field has been added.

    Not after a default has changed: then older settings are told as newer ones are that differ from them. Whoever
    changes one counts up the version of what is kept under such words (`sepjax.serve.state`).
    """
    if dataclasses.is_dataclass(settings):
        defaults = _defaults(settings)
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        changed = {name: x for name, x in values.items() if name not in defaults or _plain(x) != defaults[name]}
        return {name: told(value) for name, value in changed.items()}
    if isinstance(settings, list | tuple):
        return [told(value) for value in settings]
    return settings


def _defaults(settings: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            found[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = _plain(field.default_factory())
    return found


def _plain(value: Any) -> Any:
    values = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(values))
