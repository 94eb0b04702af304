"""Where a number comes from: commit, device, versions, date."""

import datetime
import subprocess
from pathlib import Path
from typing import Any

import jax


def checkout(root: Path) -> tuple[str | None, bool | None]:
    """The checked-out commit of `root` and whether tracked files differ from it; (None, None) outside a checkout."""
    if not (root / ".git").exists():
        return None, None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of another user
        return None, None
    return commit.strip(), bool(changes.strip())


def provenance() -> dict[str, Any]:
    """What stands beside every measured figure: device, jax version, commit of sepjax, changes to it, UTC time."""
    head, changed = checkout(Path(__file__).resolve().parents[1])
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "commit": head,
        "changed": changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def heading(source: dict[str, Any]) -> str:
    """`provenance()` in one line, to stand above a table."""
    head = f"commit {source['commit'][:9]}" if source["commit"] else "no commit known"
    changed = " with changes" if source["changed"] else ""
    return f"{source['device']}, jax {source['jax']}, {head}{changed}, {source['date']}"
