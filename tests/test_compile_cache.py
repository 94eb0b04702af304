"""Compiled programs that are kept between commands: where, unless told otherwise, and what damage does."""

import warnings

import jax
import pytest

from sepjax.command import compile_cache


@pytest.fixture
def settings(monkeypatch):
    """What `keep` changes in JAX's settings; this process's own stay as they are."""
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setattr(compile_cache, "replace_damaged", lambda folder: None)
    return changed


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)


def test_compiled_programs_are_kept_in_the_user_s_cache(tmp_path, monkeypatch, settings, no_cache, capfd):
    monkeypatch.delenv("SEPJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compile_cache.keep()
    (folder,) = (tmp_path / "cache" / "sepjax").iterdir()
    assert settings["jax_compilation_cache_dir"] == str(folder)
    assert folder.stat().st_mode & 0o077 == 0, "nobody else may put programs there"
    assert settings["jax_compilation_cache_max_size"] > 0

    settings.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    assert capfd.readouterr().err == ""
    compile_cache.keep()
    assert settings == {}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept")
    assert line.endswith(": Not a directory; name a folder in SEPJAX_CACHE")


def test_jax_s_own_settings_have_the_last_word(monkeypatch, settings, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "elsewhere", raising=False)
    compile_cache.keep()
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", False, raising=False)
    compile_cache.keep()
    assert settings == {}
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_makes_room_for_a_new_one_and_other_warnings_are_shown(tmp_path, monkeypatch, recwarn, capfd):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
    for name in ("jit_step-0a-cache", "jit_step_two-1b-cache", "jit_other-2c-cache"):
        (tmp_path / name).write_bytes(b"half")
    compile_cache.replace_damaged(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", lambda msg: None)
        warnings.showwarning(
            "Error reading persistent compilation cache entry for 'jit_step': Error -5", UserWarning, "", 1
        )
        warnings.showwarning("something else", UserWarning, "", 1)
        for name in ("jit_step", "jit_other"):
            full = f"Error writing persistent compilation cache entry for '{name}': OSError: [Errno 28] No space left"
            warnings.showwarning(full, UserWarning, "", 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"compiles them again: No space left; make room in {str(tmp_path)!r}")
    assert shown == ["something else"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_other-2c-cache", "jit_step_two-1b-cache"]
