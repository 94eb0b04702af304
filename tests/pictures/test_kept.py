"""Pictures of kept tokens: every state is what a plain list of the cache says, and a text cannot break the page."""

import dataclasses
import json
import re

import numpy as np
import pytest

from sepjax.config import AttentionConfig, ConfigError
from sepjax.generation.cache.view import CacheView
from sepjax.pictures import kept_text
from sepjax.pictures.kept import EmptyTextError, Frame
from sepjax.pictures.mask import MaskError, draw_mask, who_sees_whom
from sepjax.pictures.slots import slots_held
from sepjax.programs.picture import slots
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


@pytest.mark.parametrize("sizes", [(2, 3, 4, 14), (2, 0, 12, 14)])  # the latter evicts at every token
def test_slots_between_passes_are_those_of_a_list(sizes, tokenizer):
    sinks, most, window, size = sizes
    pattern = "separator" if most else "sink_window"
    attention = AttentionConfig(
        pattern=pattern, num_sinks=sinks, max_separators=most, window_size=window, cache_size=size
    )
    seen, held = slots_held(tiny_model(), tokenizer, TEXT, {"own": attention})["own"]
    flags = configured_table(tokenizer, attention)
    row, expected = ListStream(sinks, most, window, size), {0: {0}}
    for at, token in enumerate(tokenizer.encode(TEXT, bos=True)):
        row.append(bool(flags[token]))
        expected[at + 1] = {len(row.entries)}
        if len(row.entries) != max(expected[at]) + 1:  # compacted: what it was, less what went, before this one came
            expected[at] |= {len(row.entries) - 1}
    assert all(entries in expected[at] for at, entries in zip(seen, held, strict=True))
    assert max(held) == size
    assert seen[-1] == max(expected)


def test_arms_of_slots_may_have_a_type_of_cache(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sepjax.loading.load", lambda path, **_: (tiny_model(), tokenizer))
    (tmp_path / "text.txt").write_text(TEXT[:60], encoding="utf-8")
    arms, output = "own: sink_window a=2 n=12 c=14 cache=int8", str(tmp_path / "s.svg")
    slots.main(slots.Settings(model="tiny", text=str(tmp_path / "text.txt"), arms=arms, output=output))
    assert "own: at most 14 entries, 14 of " in capsys.readouterr().out


def test_a_mask_shows_who_sees_whom(tokenizer, tmp_path):
    attention = AttentionConfig(num_sinks=2, window_size=4)
    ids = tokenizer.encode(TEXT, bos=True)[:40]
    dense, window, own = draw_mask(tmp_path / "m.svg", tokenizer, TEXT, attention, max_tokens=40, title="tiny & text")
    flags = configured_table(tokenizer, attention)[np.array(ids)]
    i, j = np.mgrid[:40, :40]
    near, sink = (j <= i) & (i - j < 4), (j < 2) & (i - j >= 4)
    expected = np.where(near, 1, np.where(sink, 3, np.where((i - j >= 4) & flags[j], 2, 0)))
    np.testing.assert_array_equal(own.kinds, expected)
    np.testing.assert_array_equal(window.kinds, np.where(near, 1, np.where(sink, 3, 0)))
    np.testing.assert_array_equal(dense.kinds, j <= i)
    assert dense.share == 1 > own.share > window.share
    drawn = (tmp_path / "m.svg").read_text()
    for words in ("tiny &amp; text: rows look at columns", "kept from before it", f"{own.share:.0%} of the pairs"):
        assert words in drawn
    layers = dataclasses.replace(attention, kept_layers=(1,), layer_windows=(3, 5), layer_reach=(20, 0))
    first, second = (who_sees_whom(tokenizer, ids, layers, num_layers=2, layer=x).kinds for x in (0, 1))
    np.testing.assert_array_equal(first > 0, (j <= i) & ((i - j < 3) | ((j < 2) & (i - j < 20))))
    np.testing.assert_array_equal(second > 0, (j <= i) & ((i - j < 5) | (j < 2) | flags[j]))
    with pytest.raises(MaskError, match="'watched' keeps is told by the model"):
        who_sees_whom(tokenizer, ids, dataclasses.replace(attention, pattern="watched"))
    with pytest.raises(MaskError, match="--layer=2: the model has layers 0 to 1"):
        who_sees_whom(tokenizer, ids, layers, num_layers=2, layer=2)
    with pytest.raises(MaskError, match="the text is empty"):
        draw_mask(tmp_path / "m.svg", tokenizer, "", attention)


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
