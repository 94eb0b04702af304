"""Pictures of kept tokens: every state is what a plain list of the cache says, and a text cannot break the page."""

import json
import re

import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError
from sepjax.generation.cache.view import CacheView
from sepjax.pictures import kept_text
from sepjax.pictures.kept import EmptyTextError, Frame
from sepjax.separators import configured_table
from tests.generation.cache.common import ListStream
from tests.generation.tiny import tiny_model, tiny_tokenizer

ATTENTION = AttentionConfig(num_sinks=2, max_separators=3, window_size=4, cache_size=14)
TEXT = "One, two; three. </script><!-- & Ä é. Four, five: six! Seven, eight? Nine, ten. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def picture(tokenizer):
    return kept_text(tiny_model(), tokenizer, TEXT, ATTENTION)


def test_states_are_those_of_a_list(picture, tokenizer):
    ids = tokenizer.encode(TEXT, bos=True)
    flags = configured_table(tokenizer, ATTENTION)
    lists, row, at = {}, ListStream(2, 3, 4, 14), 0
    for frame in picture.frames:
        while at < frame.seen:
            row.append(bool(flags[ids[at]]))
            at += 1
        recent = [t for t, _ in row.entries[row.num_sinks + row.kept :]]
        kept = [t for t, _ in row.entries[row.num_sinks :][: row.kept]]
        lists[at] = "".join(
            "s" if t < 2 else "r" if t in recent else "9" if t in kept else "0" for t in range(frame.seen)
        )
        assert frame.states == lists[at]
        assert frame.held == len(row.entries)
    assert at == len(ids)
    assert {"s", "r", "9", "0"} == set(picture.frames[-1].states)
    assert "".join(picture.tokens) == tokenizer.decode(ids)


def test_a_page_holds_all_of_it_and_no_text_ends_it(picture):
    page = picture.html()
    held = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    data = json.loads(held[1])
    assert tuple(data["tokens"]) == picture.tokens
    assert [frame[1] for frame in data["frames"]] == [frame.states for frame in picture.frames]
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?://|\bsrc=|@import", page)


def test_a_terminal_shows_the_text(picture):
    shown = picture.terminal()
    assert "".join(picture.tokens) in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "\x1b[2m" in shown  # what is gone is faint
    assert "30;48;5;220" in shown  # what all keep is on the strongest colour


def test_shades_say_how_many_sets_keep_a_token():
    view = CacheView(seen=8, sinks=1, kept=1, recent=2, nbytes=5, kept_positions=np.array([[[3], [3]], [[4], [3]]]))
    assert Frame.of(view).states == "s0062" + "0rr"
    empty = CacheView(seen=2, sinks=1, kept=0, recent=1, nbytes=5, kept_positions=np.zeros((2, 2, 0), int))
    assert Frame.of(empty).states == "sr"


def test_few_frames_and_few_tokens(tokenizer, picture):
    short = kept_text(tiny_model(), tokenizer, TEXT, ATTENTION, max_tokens=30, max_frames=2)
    assert len(short.tokens) == short.frames[-1].seen == 30
    assert len(short.frames) <= 2 < len(picture.frames)
    with pytest.raises(ConfigError, match="keeps every token"):
        kept_text(tiny_model(), tokenizer, TEXT, AttentionConfig(pattern="dense"))
    with pytest.raises(EmptyTextError, match="the text is empty"):
        kept_text(tiny_model(), tokenizer, "", ATTENTION)
