"""Where numbers come from."""

import json
import subprocess
from pathlib import Path

import jax

from sepjax import provenance


def test_commit_is_that_of_the_checkout_and_none_outside(tmp_path: Path) -> None:
    assert provenance.checkout(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert provenance.checkout(tmp_path) == (head, False)
    (tmp_path / "file").write_text("2")
    assert provenance.checkout(tmp_path) == (head, True)


def test_provenance_is_json_and_has_a_line() -> None:
    source = json.loads(json.dumps(provenance.provenance()))
    assert source["jax"] == jax.__version__
    assert jax.devices()[0].device_kind in provenance.heading(source)
    assert "commit 0123456789 "[:16] in provenance.heading(source | {"commit": "0123456789abcdef", "changed": False})
    assert "with changes" in provenance.heading(source | {"commit": "0123456789abcdef", "changed": True})
    assert "no commit known" in provenance.heading(source | {"commit": None, "changed": None})
