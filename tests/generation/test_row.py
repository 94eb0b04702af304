"""Text until a stop string, however the tokens cut it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepjax.data.tokenizer import IncrementalDecoder, Tokenizer, train_sentencepiece
from sepjax.generation.row import RepetitionGuard, Row, RowSettings, TextUntilStop

ALPHABET = "abé"  # é: two bytes
TEXT = st.text(ALPHABET, max_size=12)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(["ab aé éé ba. abba éab"], 270)


def cut(tokenizer, text, pieces):
    """Token ids that spell `text`: in bytes, and from each of the places `pieces` on in the tokenizer's own pieces."""
    byte_ids = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    ids, start = [], 0
    for end in [*sorted(p for p in pieces if p < len(text)), len(text)]:
        part = text[start:end]
        ids += tokenizer.encode(part) if start % 2 else [byte_ids[bytes([b])] for b in part.encode()]
        start = end
    assert tokenizer.decode(ids) == text
    return ids


def before_stop(text, stops, passed=0):
    """The definition, character by character: the text before the first stop string to be complete, and whether any.

    Within `passed` characters none counts.
    """
    for end in range(passed + 1 if passed else 0, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(text=TEXT, stops=STOPS, pieces=st.lists(st.integers(0, 12), max_size=4, unique=True), early=st.integers(0, 5))
@settings(max_examples=300)
def test_text_ends_before_the_first_complete_stop_string(tokenizer, text, stops, pieces, early):
    """The first that counts: not within the first tokens of a text that needs more. Saved anywhere, it goes on."""
    tokens, decoder = cut(tokenizer, text, pieces), IncrementalDecoder(tokenizer, continues=True)
    passed = len("".join(map(decoder.feed, tokens[:early])))
    expected, stopped = before_stop(text, stops, passed)
    until_stop = TextUntilStop(tokenizer, tuple(stops), continues=True)
    out = ""
    for number, token in enumerate(tokens):
        out += until_stop.feed(token, may_stop=number >= early)
        assert expected.startswith(out)  # nothing of a stop string came out, even for a moment
        state, until_stop = until_stop.state(), TextUntilStop(tokenizer, tuple(stops), continues=True)
        until_stop.restore(state)
        if until_stop.stopped:
            break
    else:
        out += until_stop.flush()
    assert (out, until_stop.stopped) == (expected, stopped)


@given(text=TEXT, stops=STOPS)
def test_text_waits_no_longer_than_it_could_begin_a_stop_string(tokenizer, text, stops):
    until_stop = TextUntilStop(tokenizer, tuple(stops), continues=True)
    out = ""
    for i, token in enumerate(cut(tokenizer, text, [])):
        out += until_stop.feed(token)
        if until_stop.stopped:
            break
        whole = text.encode()[: i + 1].decode(errors="ignore")
        held = whole.removeprefix(out)
        assert not held or any(s.startswith(held) for s in stops)


def test_a_full_row_says_so_and_gives_what_was_held_back(tokenizer):
    settings = RowSettings.create(tokenizer, stop="cat")
    first, c = cut(tokenizer, "é", [])[0], cut(tokenizer, "c", [])[0]
    for token, text in ((first, "\ufffd"), (c, "c")):
        row = Row(tokenizer, settings, continues=True)
        event = row.take(token, taken=1, held=1, nbytes=0, is_full=True)
        assert (event.text, event.finish_reason, row.state()["finish_reason"]) == (text, "full", "full")


def test_an_unfinished_character_comes_out_at_the_end_only(tokenizer):
    first, second = cut(tokenizer, "é", [])
    until_stop = TextUntilStop(tokenizer, ("é!",), continues=True)
    assert (until_stop.feed(first), until_stop.flush()) == ("", "�")
    until_stop = TextUntilStop(tokenizer, ("é!",), continues=True)
    assert [until_stop.feed(i) for i in (first, second, first)] == ["", "", ""]
    assert until_stop.flush() == "é�"


@pytest.mark.parametrize("at", [1, RepetitionGuard.LEAST - 1, 50])
def test_repetition_is_noticed_across_the_end_of_a_turn_that_is_gone_on_with(tokenizer, at):
    """A text that came to its length and goes on ends where it would have ended without a pause."""
    tokens = [5 + i % 3 for i in range(200)]

    def taken(row, tokens):
        events = []
        for token in tokens:
            events.append(row.take(token, taken=1, held=1, nbytes=0))
            if row.finish_reason is not None:
                break
        return len(events)

    settings = RowSettings.create(tokenizer, max_repeats=20)
    whole = Row(tokenizer, settings, continues=True)
    end = taken(whole, tokens)
    assert (whole.finish_reason, end) == ("repetition", 63)
    first = Row(tokenizer, RowSettings.create(tokenizer, max_repeats=20, max_new_tokens=at), continues=True)
    assert (taken(first, tokens), first.finish_reason) == (at, "length")
    then = Row(tokenizer, settings, continues=True)
    then.restore(first.state())
    assert (at + taken(then, tokens[at:]), then.finish_reason) == (end, "repetition")
