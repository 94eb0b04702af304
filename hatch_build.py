"""Puts what stands at the root of the checkout into the wheel, where `sepjax.config.checkout` looks for it."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RootHook(BuildHookInterface):
    """Named by pyproject.toml. An editable install reads the checkout itself and gets no copies."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel of either kind is made."""
        if version == "standard":
            build_data["force_include"] |= {
                name: f"sepjax/_root/{name}" for name in ("train.py", "evaluate.py", "configs")
            }
