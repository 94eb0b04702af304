"""Facts told once and asked for later: every question has its fact before it, and the texts do not change."""

import random

import pytest

from sepjax.bench.told_facts import Fact, with_facts, write
from sepjax.config import ConfigError

TEXT = "\n\n".join(f"Paragraph {i} goes on. " + "It says a little more about nothing much. " * 8 for i in range(300))


def test_facts_stand_before_their_questions_and_out_of_sight():
    numbers = iter(range(1000))

    def numbered(_):
        n = next(numbers)
        return Fact(f"<told {n}>", f"<asked {n}>")

    text = with_facts(TEXT, random.Random(0), 3000, numbered)
    told = [n for n in range(1000) if f"<told {n}>" in text]
    gaps = [text.find(f"<asked {n}>") - text.find(f"<told {n}>") for n in told if f"<asked {n}>" in text]
    assert len(told) == pytest.approx(len(TEXT) / 3000, rel=0.3)
    assert len(gaps) > len(told) - 8
    assert min(gaps) > 2000
    for n in told:
        text = text.replace(f"<told {n}> ", "").replace(f"<told {n}>", "").replace(f"<asked {n}>", "")
    assert text.split() == TEXT.split()  # nothing else was changed


def test_a_folder_is_written_and_the_texts_are_the_same_again(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "book.txt").write_text(TEXT)
    first, second = ([x.read_text() for x in write(tmp_path / "a", tmp_path / name, 2000)] for name in "bc")
    assert first == second != [TEXT]
    with pytest.raises(ConfigError, match=r"has no \.txt files"):
        list(write(tmp_path, tmp_path / "d", 2000))
    with pytest.raises(ConfigError, match="choose another folder"):
        list(write(tmp_path / "a", tmp_path / "a", 2000))
