"""Conversations whose turns can be taken back, their commands, and the loop over a screen that is scripted."""

import importlib.util
import os
import signal

import jax
import numpy as np
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from sepjax import stream
from sepjax.generation.commands import COMMANDS, NAMES
from sepjax.generation.conversation import conversation_of
from sepjax.generation.editor import Editor
from sepjax.generation.row import CacheUse
from sepjax.generation.talk import Talk
from sepjax.generation.terminal import Lines, PressedTwice, history_file, screen_of, status, talk_on, visible
from sepjax.hub.chat_template import ChatTemplate
from tests.generation.test_chat import BY_NAME, talker  # noqa: F401

DRAWN = {"temperature": 1.0, "seed": 5, "max_new_tokens": 12}


def talk_of(talker, **settings):  # noqa: F811
    model, tokenizer = talker

    def begin(system):
        form = conversation_of(tokenizer, ChatTemplate(BY_NAME), system=system)
        ends = {"stop": form.stop, "stop_token_ids": form.stop_token_ids}
        return stream(model, tokenizer, bounded=True, **ends, **(DRAWN | settings)), form

    return Talk(begin)


def answer(talk):
    return "".join(event.text for event in talk.answer())


def everything(talk):
    """All that a conversation is: what the device holds, bit for bit, what the host knows, and its form."""
    saved = talk.events.saved()
    state = [np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
             for x in jax.tree.leaves(saved.state)]  # fmt: skip
    form = talk.form
    return [x.tobytes() for x in state], saved.pending, saved.has_drawn, saved.row, list(form._messages), form._text


def test_a_turn_that_is_taken_back_leaves_no_trace(talker):  # noqa: F811
    talk = talk_of(talker)
    for text in ("hello there.", "and again, friend."):
        talk.say(text)
        answer(talk)
    before, turns = everything(talk), talk.turns
    assert talk.cache.seen > talk.events.cache_size  # what the cache has forgotten by now is gone
    talk.say("a third turn, which is longer than the others. " * 3)
    third = answer(talk)
    assert everything(talk) != before
    talk.take_back()
    assert (everything(talk), talk.turns) == (before, turns)
    talk.say("a third turn, which is longer than the others. " * 3)
    assert answer(talk) == third
    after_third = everything(talk)
    talk.say_again()
    fourth = answer(talk)
    assert fourth != third  # drawn anew
    assert not talk.is_same
    assert talk.turns == turns + 1
    talk.take_back()
    assert everything(talk) == before
    assert talk.say_again() is None  # there is one state of before, not two
    assert after_third != before


def test_the_best_tokens_are_the_same_again(talker):  # noqa: F811
    talk = talk_of(talker, temperature=0.0)
    talk.say("hello")
    first = answer(talk)
    after = everything(talk)
    talk.say_again()
    assert answer(talk) == first
    assert talk.is_same
    keys = jax.random.key_data(talk.events.saved().state.key)
    assert keys.shape  # which other draws would come from: all else is as it was
    assert [x for x, y in zip(everything(talk)[0], after[0], strict=True) if x != y] == [np.asarray(keys).tobytes()]


class Scripted:
    """A user who says these lines, or does what an exception stands for."""

    def __init__(self, *lines, press_at=()):
        self._lines, self._press_at = iter(lines), press_at
        self.written, self.reports, self.asked, self.status = [], [], [], []

    def read(self, prompt, status):
        self.asked.append(prompt)
        self.status.append(status)
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text):
        self.written.append(text)
        if len(self.written) in self._press_at:
            os.kill(os.getpid(), signal.SIGINT)

    def report(self, text):
        self.reports.append(text)

    def said(self, words):
        return sum(words in line for line in self.reports)


def test_commands_are_answered_here(talker, tmp_path, monkeypatch):  # noqa: F811
    talk, fed, feed = talk_of(talker), [], Talk._feed
    monkeypatch.setattr(Talk, "_feed", lambda self, text: fed.append(text) or feed(self, text))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a").write_text("of somebody else")
    screen = Scripted(
        "/help", "/regenerate", "/sav x", "/usr/bin is a folder", "", "//etc is a folder", "/stats", "/save",
        f"/save {tmp_path / 'foreign'}", f"/save {tmp_path / 'kept'}", "two\nlines", "/regenerate", "/system",
        "/system be kind", "/system", "/clear", "/quit", "never",
    )  # fmt: skip
    talk_on(talk, screen)
    assert fed == ["/etc is a folder", "two\nlines", "two\nlines"]  # nothing else was said to the model
    assert all(usage in screen.reports[1] for usage in COMMANDS)
    assert screen.said("there is no turn to answer anew") == 1
    assert screen.said("unknown command /sav; did you mean '/save'") == 1
    assert screen.said("unknown command /usr/bin") == 1
    assert screen.said("where to?") == 1
    assert screen.said("not saved: ") == 1
    assert (tmp_path / "foreign" / "a").exists()
    assert screen.said("goes on from here") == 1
    assert (tmp_path / "kept" / "stream.json").exists()
    assert screen.said("no instructions") == 1
    assert screen.said("instructions: be kind") == 1
    (stats,) = (line for line in screen.reports if line.startswith("form "))
    assert "turns      1" in stats
    assert f"of 20 slots ({talk_zones(stats)})" in stats
    assert "regenerate keeps the state before the last turn: " in stats
    assert screen.said("begun anew") == 2
    assert talk.turns == talk.cache.seen == 0
    assert set(NAMES) >= {"/help", "/save", "/clear", "/regenerate", "/system", "/stats"}
    assert len(screen.asked) == 17  # nothing was read after /quit, and it asked for nothing


def talk_zones(stats):
    return stats.split("slots (")[1].split(")")[0]


def test_ctrl_c(talker, tmp_path):  # noqa: F811
    endless = {"stop_at_eos": False, "max_new_tokens": None}
    press = KeyboardInterrupt()
    talk = talk_of(talker, **endless)
    screen = Scripted("hello", "again", press, str(tmp_path), "", press_at=(5, 12))
    talk_on(talk, screen)
    assert screen.written[5] == "\n" or screen.written[4].endswith("\n")
    assert screen.said("(cut short)") == 2
    # An answer that was cut short, and Ctrl-C at the prompt: that is twice. It is saved where that can be.
    assert screen.asked == [">>> "] * 3 + ["save in which folder? (none: leave without) "]
    assert screen.said("saved in ") == 1
    assert (tmp_path / "stream.json").exists()

    screen = Scripted(press, "/stats", press, press)  # something else came between the first two
    talk_on(talk_of(talker), screen)
    assert len(screen.asked) == 4  # and nothing to save: nothing was said
    assert screen.said("once more leaves") == 2

    talk = talk_of(talker, **endless)
    screen = Scripted("hello", PressedTwice(), press, press_at=(3,))  # a line cleared, then again; no wish to save
    talk_on(talk, screen)
    assert len(screen.asked) == 3
    assert talk.events.finish_reason is None


def test_a_second_ctrl_c_within_an_answer_takes_the_turn_back(talker, monkeypatch):  # noqa: F811
    talk = talk_of(talker, stop_at_eos=False, temperature=0.0, max_new_tokens=None)
    talk.say("hello")
    answering = talk.answer()
    next(answering)
    answering.close()
    before = everything(talk)

    class Pressing(Scripted):
        def write(self, text):
            super().write(text)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    screen = Pressing("again", EOFError())
    talk_on(talk, screen)
    assert screen.said("that turn is taken back") == 1
    assert everything(talk) == before

    class PressingAtOnce(Scripted):
        def report(self, text):
            super().report(text)
            for _ in range(self.presses if text.startswith(("form", "rewrites")) else 0):
                os.kill(os.getpid(), signal.SIGINT)

    feed = Talk._feed
    monkeypatch.setattr(Talk, "_feed", lambda self, text: feed(self, text) or "rewrites turns")
    for presses, line in ((1, "again"), (2, "again"), (1, "/stats"), (2, "/stats")):
        talk.is_saved = True
        before = everything(talk)
        screen = PressingAtOnce(line, KeyboardInterrupt(), EOFError())
        screen.presses = presses
        talk_on(talk, screen)
        assert screen.written == []
        assert everything(talk) == before, (presses, line)  # a turn that was answered is not taken back


def test_what_cannot_be_said_leaves_the_conversation_as_it_was(talker):  # noqa: F811
    refusing = "{% for m in messages %}{{ raise_exception('no') if m.content == 'bad' }}{{ m.content }}{% endfor %}"
    model, tokenizer = talker
    talk = Talk(lambda system: (
        stream(model, tokenizer, bounded=True, **DRAWN), conversation_of(tokenizer, ChatTemplate(refusing))
    ))  # fmt: skip
    screen = Scripted("bad", "/stats")
    talk_on(talk, screen)
    assert screen.said("as it was before") == 1
    assert talk.turns == 0
    assert not talk.events.saved().pending


def test_the_status_line_is_what_the_cache_holds(talker):  # noqa: F811
    talk = talk_of(talker)
    assert status(talk, 20).startswith(f"[{'.' * 20}] 0 sinks, 0 kept, 0 recent of 20 | 0 tokens seen")
    talk.say("hello, there. A; b: c! " * 4)
    answer(talk)
    view, use = talk.view(), talk.cache
    assert (view.sinks, view.kept) == (2, 3)
    assert view.held == use.held
    assert isinstance(use, CacheUse)
    line = status(talk, 20)
    assert line.startswith("[##===" + "|" * view.recent)
    assert f"2 sinks, 3 kept, {view.recent} recent of 20 | {use.seen} tokens seen" in line


def test_what_a_model_says_cannot_steer_the_terminal(capfd):
    assert visible("a\tb\nc 日本 🙂") == "a\tb\nc 日本 🙂"
    assert visible("\x1b]52;c;aGk=\x07\r\x9b1m\x7f") == "␛]52;c;aGk=␇␍�1m�"
    screen = Lines()
    screen.write("\x1b[2J")
    screen.report("\x1b[2J")
    assert capfd.readouterr() == ("␛[2J", "␛[2J\n")


def test_history_is_kept_where_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEPJAX_CACHE", str(tmp_path / "cache"))
    assert history_file() == tmp_path / "cache" / "chat_history"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEPJAX_CACHE", str(tmp_path / "file"))
    assert history_file() is None


def test_without_the_editor_lines_are_the_terminals_own(monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert type(screen_of(private=True)) is Lines
    assert capfd.readouterr().err.endswith("need prompt_toolkit: pip install 'sepjax[chat]'\n")
    monkeypatch.setattr("builtins.input", lambda prompt: f"after {prompt}")
    assert Lines().read(">>> ", "status") == "after >>> "


def test_the_editor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    history = tmp_path / "history"
    history.write_text("".join(f"\n# {i}\n+line {i}\n+more\n" for i in range(60_000)))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = Editor(history)
        assert history.stat().st_size < 2**20
        assert history.read_text().startswith("# ")
        keys.send_text("\x1b[A\r")
        assert editor.read(">>> ", "status") == "line 59999\nmore"
        keys.send_text("kept\r")
        assert editor.read(">>> ", "status") == "kept"
        for written, more in (("/save a", [" folder"]), ("/s", ["/save", "/system", "/stats"]), ("a /s", [])):
            found = editor._session.completer.get_completions(Document(written), CompleteEvent())
            assert [completion.text for completion in found] == more
        for pressed, kind in (("\x03", KeyboardInterrupt), ("abc\x03\x03", PressedTwice), ("\x04", EOFError)):
            keys.send_text(pressed)
            with pytest.raises(kind) as raised:
                editor.read(">>> ", "status")
            assert type(raised.value) is kind
        keys.send_text("abc\x03d\x03e\r")  # the second clears another line
        assert editor.read("a question? ", "status") == "e"
        before = history.read_text()
        assert before.endswith("+kept\n")  # and not the answer to a question
        private = Editor(None)
        keys.send_text("a secret\r")
        assert private.read(">>> ", "status") == "a secret"
        keys.send_text("\x1b[A\r")
        assert private.read(">>> ", "status") == "a secret"
        assert history.read_text() == before
