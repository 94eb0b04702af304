"""A request that continues what was read before is answered as if it had been read from its beginning."""

import asyncio
import json
import shutil
import time

import numpy as np
import pytest

from sepjax.bench.load import numbers
from sepjax.generation.slots import SlotRequest
from sepjax.serve import worker as worker_module
from sepjax.serve.conversations import BLOCK, Conversations, chain
from sepjax.serve.jobs import Inbox, Job
from sepjax.serve.metrics import Metrics
from sepjax.serve.state import StateError
from sepjax.serve.worker import Worker
from tests.serve.tiny import alone, client, running, settled, text_of, tiny_served

SYSTEM = np.random.default_rng(1).integers(3, 300, 2 * BLOCK + 9).tolist()


@pytest.fixture(scope="module")
def served():
    return tiny_served()


def complete(server, prompt, **settings):
    settings = {"max_tokens": 10, "temperature": 0, "extra_body": {"ignore_eos": True}} | settings
    with client(server) as api:
        return api.completions.create(model="tiny", prompt=prompt, **settings)


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def talk(server, served, turns, *, temperature=0.0, seed=0, prompt=(), expected=None):
    """Turns of one conversation, each answered as the engine alone answers all of its ids; returns them all."""
    ids = list(prompt)
    for turn in range(turns):
        before, ids = ids, [*ids, *np.random.default_rng(turn).integers(3, 300, 4 + 11 * (turn % 3)).tolist()]
        events = alone(served, ids, temperature, seed=seed + turn, max_new_tokens=10, stop_at_eos=False)
        got = complete(server, ids, temperature=temperature, seed=seed + turn)
        assert got.choices[0].text == text_of(events), turn
        assert cached(got) == (expected if expected is not None and not turn else max(0, len(before) - 1)), turn
        assert got.usage.prompt_tokens == len(ids)
        ids += [token for event in events for token in event.token_ids]
        assert server.worker.conversations.get(got.id).token_ids == ids
    return ids


def test_conversations_go_on_from_their_cache_and_say_the_same(served):
    """Long ones, far beyond what the cache holds; best tokens and drawn ones. Watched ones are in test_view.py."""
    with running(served) as server:
        talk(server, served, 5)
        talk(server, served, 3, temperature=1.3, seed=4)
        assert settled(server)


def test_penalties_are_those_of_the_whole_text_however_it_was_read(served):
    """What was drawn and never became a part of the text has none: the token after a beginning that was kept."""
    with running(served) as server:
        settings = {"repetition_penalty": 4.0, "presence_penalty": 1.5, "frequency_penalty": 0.5}
        first = talk(server, served, 2)
        for prompt in (first, *([*SYSTEM, 10 + number] for number in range(3))):
            given = {"extra_body": {"repetition_penalty": 4.0, "ignore_eos": True}} | settings
            del given["repetition_penalty"]
            got = complete(server, prompt, **given)
            expected = alone(served, prompt, max_new_tokens=10, stop_at_eos=False, **settings)
            assert got.choices[0].text == text_of(expected)
        assert cached(got) == 2 * BLOCK


def test_only_what_is_the_same_from_its_first_token_is_gone_on_from(served):
    with running(served) as server:
        ids = talk(server, served, 2)
        for other in ([*ids[:-1], 7, 9], [8, *ids[1:], 9], ids[:-2]):
            if other[0] != ids[0]:
                assert cached(complete(server, other)) == 0
            got = complete(server, other)
            events = alone(served, other, max_new_tokens=10, stop_at_eos=False)
            assert got.choices[0].text == text_of(events)
        # The last token was drawn, but the cache has yet to take it up.
        assert cached(complete(server, ids)) == len(ids) - 1
        branch = talk(server, served, 1, prompt=ids, expected=len(ids) - 1)
        assert branch[: len(ids)] == ids
        text = client(server).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Where is it?"}], max_tokens=4, temperature=0
        )
        assert server.worker.conversations.get(text.id).token_ids[-4:]


def test_an_answer_that_is_broken_off_leaves_what_was_before(served):
    with running(served) as server:
        kept, ids = server.worker.conversations, talk(server, served, 2)
        before = {key: entry.names for key, entry in kept._entries.items()}
        api = client(server)
        for _ in range(2):
            settings = {"temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
            stream = api.completions.create(model="tiny", prompt=[*ids, 7, 8], max_tokens=10**6, **settings)
            begun = next(iter(stream))
            stream.close()
            assert settled(server)
            assert kept.get(begun.id) is None
            assert {key: entry.names for key, entry in kept._entries.items()} == before
        got = complete(server, [*ids, 7, 8])
        assert cached(got) == len(ids) - 1
        assert got.choices[0].text == text_of(alone(served, [*ids, 7, 8], max_new_tokens=10, stop_at_eos=False))
        api.close()


def test_a_beginning_that_comes_again_is_read_once(served):
    """Not at its first use: at its second it is kept, and from the third on nobody reads it."""
    with running(served) as server:
        counts = []
        for number in range(4):
            prompt = [*SYSTEM, 10 + number, 20, 30]
            got = complete(server, prompt)
            counts.append(cached(got))
            assert got.choices[0].text == text_of(alone(served, prompt, max_new_tokens=10, stop_at_eos=False))
        assert counts == [0, 0, 2 * BLOCK, 2 * BLOCK]
        several = complete(server, [*SYSTEM, 99], n=4, temperature=1.2, seed=1)
        for number, choice in enumerate(several.choices):
            events = alone(served, [*SYSTEM, 99], 1.2, seed=1 + number, max_new_tokens=10, stop_at_eos=False)
            assert choice.text == text_of(events)
        assert settled(server)
        assert server.worker.conversations._making == set()


def tokens_read(server):
    """Of prompts, that no row had read before."""
    found = numbers(server.worker.tell())
    return found["prompt_tokens_total"] - found["prompt_tokens_cached_total"]


def test_choices_of_one_prompt_read_it_once(served):
    """More of them than there are rows; each draws for itself, and has the penalties of the whole prompt."""
    ids, settings = [*SYSTEM, 17], {"temperature": 1.2, "seed": 3, "presence_penalty": 1.0}
    with running(served) as server:
        for known in (0, len(ids) - 1):  # the second time nothing is left to be read together
            before = tokens_read(server)
            extra = {"repetition_penalty": 2.0, "ignore_eos": True}
            got = complete(server, ids, n=6, extra_body=extra, **settings)
            assert tokens_read(server) - before == len(ids) + 5 - (known and len(ids) - 1)
            assert (cached(got), got.usage.prompt_tokens) == (known, len(ids))
            for number, choice in enumerate(got.choices):
                draws = settings | {"seed": 3 + number, "repetition_penalty": 2.0}
                events = alone(served, ids, max_new_tokens=10, stop_at_eos=False, **draws)
                assert choice.text == text_of(events), number
        ids = [*SYSTEM[:BLOCK], 17]  # what others had before is all that is read together
        for number, choice in enumerate(complete(server, ids, n=3, **settings).choices):
            draws = settings | {"seed": 3 + number}
            assert choice.text == text_of(alone(served, ids, max_new_tokens=10, stop_at_eos=False, **draws)), number
        two = complete(server, [[7, 8, 9], [9, 8]], n=2)
        assert [x.text for x in two.choices[::2]] == [x.text for x in two.choices[1::2]]
        api = client(server)
        stream = api.completions.create(
            model="tiny", prompt=[5] * 3000, n=9, max_tokens=50, stream=True, extra_body={"ignore_eos": True}
        )
        stream.close()  # while one reads, and the others wait for it or for a row
        assert settled(server)
        assert server.worker.conversations._making == set()


@pytest.mark.soak  # programs of its own; that such a cache is full: generation/test_stream.py
def test_a_cache_that_must_not_lose_separators_ends_its_own_answer_only():
    served = tiny_served(keep_all_separators=True)
    (dot,) = served.tokenizer.encode(".")[-1:]
    with running(served) as server:
        for _ in range(3):  # the second time the beginning is read by itself, and is full too
            got = complete(server, [dot] * 70, n=2)
            assert [(x.text, x.finish_reason) for x in got.choices] == [("", "length")] * 2
            assert (cached(got), got.usage.completion_tokens) == (0, 0)
        assert complete(server, [5, 6]).usage.completion_tokens == 10
        assert server.worker.conversations._making == set()
        assert settled(server)


@pytest.mark.soak  # as above
def test_a_row_that_is_full_is_not_kept():
    """It may end by its length before anybody says so. Whoever went on from it would be refused."""
    served = tiny_served(keep_all_separators=True)
    (dot,) = served.tokenizer.encode(".")[-1:]
    with running(served) as server:
        for size in range(1, 2 * BLOCK + 2):
            stream = served.engine.stream([dot] * size, bounded=True, max_new_tokens=1)
            list(stream)
            if stream.saved().is_full:
                break
        else:
            pytest.fail("it never gets full")
        got = complete(server, [dot] * size, max_tokens=1)
        assert got.usage.completion_tokens == 1
        assert server.worker.conversations.get(got.id) is None
        for _ in range(3):  # at the second a beginning is read by itself
            again = complete(server, [*[dot] * max(size, BLOCK), 5, 6], max_tokens=1)
            assert again.choices[0].finish_reason == "length"
        assert not any(entry.row.is_full for entry in server.worker.conversations._entries.values())
        assert server.worker.conversations._making == set()
        assert settled(server)


def test_memory_has_a_bound_and_the_least_recently_used_go_first(served):
    with running(served, cache_memory=4 * served.row_bytes) as server:
        kept = server.worker.conversations
        first = talk(server, served, 1, prompt=[11])
        for number in range(12, 20):
            got = complete(server, [*SYSTEM, number])
            assert kept.nbytes <= 4 * served.row_bytes
            assert len(kept) <= 4
            assert cached(got) == (0 if number < 14 else 2 * BLOCK), "what is used again and again stays"
        assert cached(complete(server, [*first, 5])) == 0
        assert kept.nbytes == sum(entry.nbytes for entry in kept._entries.values())
        ids = talk(server, served, 10, prompt=[21])
        assert len(ids) > 10 * served.cache_size
        assert kept.nbytes <= 4 * served.row_bytes
        assert len(kept._names) == sum(len(entry.names) for entry in kept._entries.values()) <= 32
    with running(served, cache_memory=0) as server:
        ids = complete(server, first)
        assert cached(complete(server, [*first, 5])) == 0
        assert len(server.worker.conversations) == 0
        assert settled(server)


def test_state_survives_a_restart_and_a_kill(served, tmp_path):
    state = str(tmp_path / "state")
    with running(served, state=state) as server:
        one, two = talk(server, served, 3), talk(server, served, 2, temperature=1.1, seed=9, prompt=[44])
        with pytest.raises(StateError, match="another server uses"), running(served, state=state):
            pass
        killed = tmp_path / "killed"
        shutil.copytree(state, killed)  # as a kill would leave it: every turn that has ended is there
    for folder in (state, str(killed)):
        with running(served, state=folder) as server:
            assert server.worker.conversations.nbytes < served.row_bytes, "rows are read when they are needed"
            talk(server, served, 2, prompt=one, expected=len(one) - 1)
            talk(server, served, 1, temperature=1.1, prompt=two, expected=len(two) - 1)

    files = sorted(killed.glob("*.json"))
    key = next(path.stem for path in files if path.name != "server.json")
    (killed / f"{key}.json").unlink()  # a kill before this was written
    torn = next(path.stem for path in files if path.stem not in ("server", key))
    with (killed / torn / "state.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\xff\xff")
    with running(served, state=str(killed)) as server:
        assert not (killed / key).exists()
        for ids in (one, two):
            got = complete(server, [*ids, 5])
            assert got.choices[0].text == text_of(alone(served, [*ids, 5], max_new_tokens=10, stop_at_eos=False))

    with running(served, state=state, state_bytes=3 * served.row_bytes, cache_memory=2 * served.row_bytes) as server:
        for number in range(5):
            talk(server, served, 1, prompt=[60 + number])
        assert (
            sum(path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file())
            < 4 * served.row_bytes
        )

    other = tiny_served(max_separators=2)
    with (
        pytest.raises(StateError, match=r"weights, another pattern .*, or of an older"),
        running(other, state=state),
    ):
        pass
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("mine")
    with (
        pytest.raises(StateError, match=r"holds dear\.txt, which is not"),
        running(served, state=str(tmp_path / "letters")),
    ):
        pass


def test_a_slow_client_holds_no_row_and_loses_nothing(served, monkeypatch):
    """Its row is put aside, where it is, until it has read what there was."""
    monkeypatch.setattr(worker_module, "_UNREAD", 8)
    prompt, most = [5, 9, 270], 60

    async def slow(server):
        body = {"prompt": prompt, "max_tokens": most, "temperature": 1.2, "seed": 3, "stream": True, "ignore_eos": True}
        inputs = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        written, gate, aside = [], asyncio.Event(), 0

        async def receive():
            if inputs:
                return inputs.pop()
            await asyncio.Event().wait()

        async def send(message):
            nonlocal aside
            await gate.wait()
            aside = max(aside, len(server.worker._aside))
            written.append(message.get("body", b""))
            await asyncio.sleep(0.02)  # several steps

        headers = ((b"content-type", b"application/json"), (b"host", b"localhost"))
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        scope |= {"client": ("here", 1), "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
        task = asyncio.create_task(server.app(scope, receive, send))
        while not server.worker._aside:
            await asyncio.sleep(0.01)
        assert (server.worker.num_running, server.worker.slots.num_free) == (0, 4 - len(server.worker.slots._known))
        other = await asyncio.to_thread(complete, server, [7])
        assert other.choices[0].text == text_of(alone(served, [7], max_new_tokens=10, stop_at_eos=False))
        gate.set()
        await task
        events = [event for event in b"".join(written).decode().split("\n\n") if event.startswith("data: {")]
        return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events), aside

    with running(served) as server:
        text, aside = asyncio.run(slow(server))
        assert text == text_of(alone(served, prompt, 1.2, seed=3, max_new_tokens=most, stop_at_eos=False))
        assert aside == 1
        assert settled(server)


def test_a_client_of_many_choices_is_not_slow(served):
    """What the worker has not handed over yet is not the client's to read, and each choice has a share of the rest."""

    async def found():
        inbox = Inbox(asyncio.get_running_loop(), 4)
        worker = Worker(lambda: served, lambda _: None, rows=4, max_waiting=0, metrics=Metrics())
        event = next(iter(alone(served, [5], max_new_tokens=1)))
        worker._out._sent_at = time.monotonic() + 3600  # it waits with what is not urgent
        job = Job(inbox, 0, np.array([5], np.int32), SlotRequest(None), "", 0.0)
        counts = []
        for _ in range(8):
            worker._put(job, event, is_urgent=False)
        worker._send()
        counts.append(inbox.unread)
        worker._out.send(0, everything=True)
        counts.append(inbox.unread)
        await inbox.take()
        return [*counts, inbox.unread]

    assert asyncio.run(found()) == [0, 2, 0]


def test_rows_are_found_by_their_ids_alone(served):
    """Against a search through all of them."""
    rng = np.random.default_rng(0)
    kept = Conversations(served.tokenizer, 1 << 40)
    row = served.engine.stream([5, 6], bounded=True).saved()
    texts = [rng.integers(3, 6, rng.integers(1, 4 * BLOCK)).astype(np.int32) for _ in range(60)]
    texts += [text[: rng.integers(1, len(text) + 1)] for text in texts] + [
        np.concatenate([text, text]) for text in texts
    ]
    for text in texts:
        kept.add(text, chain(text, chain(text[: len(text) // 2])), None, row)
    for text in [*texts, *(np.append(text, np.int32(3)) for text in texts)]:
        begins = [other for other in texts if len(other) < len(text) and np.array_equal(other, text[: len(other)])]
        plan = kept.plan(text, chain(text))
        assert plan.cached == max(map(len, begins), default=0)
        if plan.cut:
            kept.given_up(plan.cut, chain(text))
            assert plan.cached + BLOCK <= plan.cut < len(text)


def test_what_is_read_by_itself_leaves_text_to_be_read(served, monkeypatch):
    """Or the answer's first space, which goes with the text before it, would be lost or added."""
    tokenizer, word = served.tokenizer, served.tokenizer.encode("the")[-1]
    monkeypatch.setattr(tokenizer, "starts_with_space", True)
    assert tokenizer.token_bytes(word)
    assert not tokenizer.token_bytes(tokenizer.bos_id)
    for text, cut in ((BLOCK + 9, BLOCK), (2 * BLOCK, BLOCK), (2 * BLOCK + 1, 2 * BLOCK), (0, 0)):
        kept = Conversations(tokenizer, 1 << 40)
        ids = np.array([word] * text + [tokenizer.bos_id] * 3 * BLOCK, np.int32)
        assert kept.plan(ids, chain(ids)).cut == 0
        assert kept.plan(ids, chain(ids)).cut == cut
