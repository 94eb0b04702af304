"""What the openai client gets, field by field, against the engine alone."""

import copy
import dataclasses
import json
import random
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import openai
import pytest

from sepjax import Generator
from sepjax.config import ConfigError
from sepjax.generation.prompts import recommended_sampling
from sepjax.generation.row import CacheUse, StreamEvent
from sepjax.hub.chat_template import ChatTemplate
from sepjax.measure import counted_compilations
from sepjax.model.transformer import merge, split
from sepjax.serve.messages import Message
from sepjax.serve.protocol import chat_request
from sepjax.serve.responses import DONE, Answer
from sepjax.serve.served import Served
from tests.generation.tiny import LONG, tiny_engine, tiny_model
from tests.hub.test_tool_calls import QWEN
from tests.serve.test_protocol import CALL, TOOLS
from tests.serve.tiny import alone, client, random_request, running, settled, text_of, tiny_served, wanted_of

IDS = [5, 270, 280, 9, 265]
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.fixture(scope="module")
def server(served):
    with running(served) as server:
        yield server
        assert settled(server)


@pytest.fixture(scope="module")
def api(server):
    return client(server)


def complete(api, prompt=IDS, **settings):
    return api.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 12, "temperature": 0} | settings)


def say(api, *said, **settings):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return api.chat.completions.create(
        model="tiny", messages=messages, **{"max_tokens": 12, "temperature": 0} | settings
    )


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {}),
        ({"temperature": 1.3, "seed": 7}, {"temperature": 1.3, "seed": 7}),
        ({"temperature": 1, "seed": 2**32 + 7}, {"temperature": 1.0, "seed": 7}),
        ({"temperature": 1.5, "top_p": 0.7, "seed": 1}, {"temperature": 1.5, "top_p": 0.7, "seed": 1}),
        ({"temperature": 2, "seed": 1, "top_k": 3}, {"temperature": 2.0, "top_k": 3, "seed": 1}),
        ({"temperature": 2, "seed": 1, "top_k": -1}, {"temperature": 2.0, "seed": 1}),
        ({"temperature": 2, "seed": 1, "min_p": 0.7}, {"temperature": 2.0, "min_p": 0.7, "seed": 1}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"stop": ["e", " "], "min_tokens": 9}, {"stop": ["e", " "], "min_new_tokens": 9}),
        ({"presence_penalty": 2, "frequency_penalty": -1}, {"presence_penalty": 2.0, "frequency_penalty": -1.0}),
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"logit_bias": {"40": 7.5, "281": -100}}, {"logit_bias": {40: 7.5, 281: -100.0}}),
        (
            {"ignore_eos": True, "temperature": 3, "max_tokens": 90},
            {"stop_at_eos": False, "temperature": 3.0, "max_new_tokens": 90},
        ),
    ],
)
def test_settings_are_the_engine_s(api, served, fields, settings):
    extra = {
        name: fields.pop(name)
        for name in ("top_k", "min_p", "ignore_eos", "repetition_penalty", "min_tokens")
        if name in fields
    }
    fields, settings = {"seed": 0} | fields, {"max_new_tokens": 12} | settings
    got = complete(api, **fields, extra_body=extra)
    expected = alone(served, IDS, **settings)
    assert got.choices[0].text == text_of(expected)
    assert got.choices[0].finish_reason == REASONS[expected[-1].finish_reason]
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(IDS), len(expected))
    assert got.usage.total_tokens == len(IDS) + len(expected)


def test_what_a_request_does_not_say_the_model_s_files_say(served):
    tokenizer = copy.copy(served.tokenizer)
    said = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
    tokenizer.special = dataclasses.replace(tokenizer.special, sampling=said)
    given = dataclasses.replace(served, defaults=recommended_sampling(tokenizer))
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "top_p": None, "min_p": 0.5}
    asked = chat_request(given.filled(body)).wanted
    found = asked.temperature, asked.top_p, asked.top_k, asked.min_p, asked.repetition_penalty
    assert found == (0, 0.8, 50, 0.5, 1.1)
    assert given.filled([1]) == [1]
    with pytest.raises(ConfigError, match=r"no generation_config\.json"):
        Served.create("tiny", served.engine, None, sampling_defaults=True)


def test_what_ends_an_answer(api, served):
    tokens = [token for event in alone(served, IDS, max_new_tokens=40) for token in event.token_ids]
    text = served.tokenizer.decode(tokens, continues=True)
    for stop in (text[7:9], [text[7:9], "nowhere", "never", "not at all"]):
        got = complete(api, max_tokens=40, stop=stop)
        assert got.choices[0].text == text[: text.index(text[7:9])]
        assert got.choices[0].finish_reason == "stop"
    got = complete(api, max_tokens=40, extra_body={"stop_token_ids": [tokens[6]]})
    first = tokens.index(tokens[6])
    assert got.choices[0].text == served.tokenizer.decode(tokens[:first], continues=True)
    assert (got.choices[0].finish_reason, got.usage.completion_tokens) == ("stop", first + 1)
    with pytest.raises(openai.BadRequestError, match="min_tokens=5 must be at most as many as max_tokens, which is 4"):
        complete(api, max_tokens=4, extra_body={"min_tokens": 5})
    chat = say(api, "One; two", temperature=2.5, seed=11, max_tokens=200)
    ids = served.chat_ids((Message("user", "One; two"),))
    expected = alone(served, ids, 2.5, seed=11, max_new_tokens=200, stop=["\nUser:"])
    assert chat.choices[0].message.content == text_of(expected)
    assert (
        chat.choices[0].finish_reason == {"eos": "stop", "stop": "stop", "length": "length"}[expected[-1].finish_reason]
    )


def test_prompts_of_every_form_and_several_choices(api, served):
    text, ids = "The cat", served.tokenizer.encode("The cat", bos=True)
    for prompt in (text, [text], ids, [ids]):
        assert complete(api, prompt).choices[0].text == text_of(alone(served, ids, max_new_tokens=12))
    got = complete(api, [LONG, IDS], n=2, seed=5, temperature=1.2)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    longer = served.tokenizer.encode(LONG, bos=True)
    for number, (choice, prompt) in enumerate(zip(got.choices, [longer, longer, IDS, IDS], strict=True)):
        assert choice.text == text_of(alone(served, prompt, 1.2, seed=5 + number, max_new_tokens=12))
    assert got.usage.prompt_tokens == len(longer) + len(IDS)
    assert got.usage.completion_tokens == 48
    assert len(complete(api, "a", max_tokens=openai.NOT_GIVEN).choices[0].text) > 3  # OpenAI's 16
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    settings = {"model": "tiny", "max_completion_tokens": 12, "temperature": 0}
    inparts = api.chat.completions.create(messages=[{"role": "user", "content": parts}], **settings)
    assert inparts.choices[0].message.content == say(api, "The cat").choices[0].message.content
    messages: list = [{"role": "developer", "content": "Mind."}, {"role": "user", "content": "The cat"}]
    told = api.chat.completions.create(messages=messages, **settings)
    ids = served.chat_ids((Message("system", "Mind."), Message("user", "The cat")))
    assert told.choices[0].message.content == text_of(alone(served, ids, max_new_tokens=12, stop=["\nUser:"]))
    assert told.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_stream_is_the_answer_in_pieces(api, kind):
    ask = complete if kind == "completions" else lambda api, **more: say(api, "The cat", **more)
    settings = {
        "n": 2,
        "seed": 3,
        "temperature": 1.1,
        "max_tokens": 30,
        "extra_body": {"ignore_eos": True},
        "logprobs": 0 if kind == "completions" else True,
    }
    whole = ask(api, **settings)
    options = {"include_usage": True, "include_cache": True, "continuous_usage_stats": kind == "chat"}
    chunks = list(ask(api, **settings, stream=True, stream_options=options))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 60
    told = [chunk.usage and chunk.usage.completion_tokens for chunk in chunks[:-1]]
    assert (chunks[-1].choices, told) == ([], sorted(told) if kind == "chat" else [None] * len(told))
    for choice in whole.choices:
        mine = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        if kind == "chat":
            assert "".join(part.delta.content or "" for part in mine) == choice.message.content
            assert (mine[0].delta.role, {part.delta.role for part in mine[1:]}) == ("assistant", {None})
            got = [token for part in mine for token in part.logprobs.content]
            assert got == choice.logprobs.content
        else:
            assert "".join(part.text for part in mine) == choice.text
            for name in ("tokens", "token_logprobs", "text_offset"):
                joined = [x for part in mine for x in getattr(part.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]
    caches = [chunk.cache for chunk in chunks if getattr(chunk, "cache", None)]
    assert caches
    assert all(0 < cache["held"] <= cache["size"] + 1 and cache["bytes"] > 0 for cache in caches)
    assert all(cache["sinks"] + cache["kept"] + cache["recent"] == cache["held"] for cache in caches)
    assert caches[-1]["seen"] >= 30


def test_a_stream_ends_with_done(server):
    body = json.dumps({"prompt": IDS, "max_tokens": 2, "stream": True}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_log_probabilities(api, served):
    expected = alone(served, IDS, max_new_tokens=6, logprobs=True)
    tokens = [token for event in expected for token in event.token_ids]
    got = complete(api, max_tokens=6, logprobs=0).choices[0].logprobs
    assert got.token_logprobs == pytest.approx([event.logprob for event in expected], abs=1e-5)
    assert got.tokens == [served.token_text(token) for token in tokens]
    assert got.text_offset == np.cumsum([0, *map(len, got.tokens[:-1])]).tolist()
    tops = alone(served, IDS, max_new_tokens=6, top_logprobs=3)
    got = complete(api, max_tokens=6, logprobs=3).choices[0].logprobs
    for found, event in zip(got.top_logprobs, tops, strict=True):
        wanted = {served.token_text(token): logprob for token, logprob in event.top_logprobs}
        assert found == pytest.approx(wanted, abs=1e-5)
        assert len(found) == 3
    chat = say(api, "The cat", logprobs=True, top_logprobs=2).choices[0]
    for token in chat.logprobs.content:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (x.logprob for x in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.logprob
    assert (
        b"".join(bytes(token.bytes) for token in chat.logprobs.content).decode(errors="replace") == chat.message.content
    )
    assert say(api, "The cat").choices[0].logprobs is None


def test_tokens_and_models(server, api, served):
    def post(path, **body):
        request = urllib.request.Request(
            server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request).read())

    found = post("/tokenize", prompt="The cat")
    assert found["tokens"] == served.tokenizer.encode("The cat", bos=True)
    assert found["count"] == len(found["tokens"])
    plain = served.tokenizer.encode("The cat")
    assert post("/tokenize", prompt="The cat", add_special_tokens=False)["tokens"] == plain
    messages = [{"role": "user", "content": "Hi"}]
    assert post("/tokenize", messages=messages)["tokens"] == served.chat_ids((Message("user", "Hi"),))
    assert post("/detokenize", tokens=plain) == {"prompt": "The cat"}
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    told = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert all('model_name="tiny"' in line for line in told.splitlines() if line[0] != "#")
    plain = re.sub(r',?model_name="tiny",?', "", told).replace("{}", "")
    for name in ("num_requests_running 0.0", "num_requests_waiting 0.0", "time_to_first_token_seconds_count",
                 "time_per_output_token_seconds_bucket", "inter_token_latency_seconds_sum", "prompt_tokens_total",
                 "generation_tokens_total", "launches_total",
                 "cache_slots_held 0.0", 'cache_slots_held_by_zone{zone="kept"} 0.0', "cache_bytes"):  # fmt: skip
        assert f"sepjax:{name}" in plain


def test_chat_template_kwargs_are_what_the_template_may_name(api, served):
    template = ChatTemplate("{{ messages[0].content }}{{ '' if brief else ' please' }}").with_variables({"brief": True})
    brief, hi = dataclasses.replace(served, template=template), (Message("user", "Hi"),)
    assert brief.chat_ids(hi) == served.tokenizer.encode("Hi")
    assert brief.chat_ids(hi, {"brief": False}) == served.tokenizer.encode("Hi please")
    with pytest.raises(openai.BadRequestError, match="the model has no chat template; leave them out"):
        say(api, "Hi", extra_body={"chat_template_kwargs": {"brief": False}})


def test_tools_go_to_the_template_and_calls_come_out_of_the_answer(api, served):
    """In one piece and in chunks; names of control tokens in arguments are text; what would be lost is refused."""
    using = dataclasses.replace(served, template=ChatTemplate(QWEN))
    messages = [{"role": "user", "content": "Ulm?"}, CALL, {"role": "tool", "tool_call_id": "c", "content": "12"}]
    asked = chat_request({"messages": messages, "tools": TOOLS})
    using.check_calls()
    text = using.tokenizer.decode(using.chat_ids(asked.messages, tools=asked.tools))
    for words in ('"function": {"name": "f"', '{"name": "f", "arguments": {"city": "Ulm"}}', "tool\n12"):
        assert words in text
    for body, message in (
        ({"messages": messages}, "there is no chat template to write messages[1].tool_calls with this model"),
        ({"messages": messages[:1], "tools": TOOLS}, "calls of this model are not found in its answers"),
        ({"messages": messages[:1], "tools": TOOLS, "tool_choice": "none"}, "chat template to write tools with"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)):
            api.chat.completions.create(model="tiny", **body)
    pieces = ['Look.\n<tool_call>{"name": "f", ', '"arguments": {"city": "Ulm"}}</tool', "_call>"]
    use = CacheUse(1, 1, 1)
    events = [StreamEvent(piece, (5,), "eos" if piece == pieces[-1] else None, use) for piece in pieces]
    made = {"is_chat": True, "prompt_tokens": [3], "finds_calls": True}
    whole, parts = (Answer("id", using, asked.wanted, **made) for _ in range(2))
    whole.add([(0, event) for event in events])
    (choice,) = whole.whole()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Look.", "tool_calls")
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"city": "Ulm"}'}
    assert chat_request({"messages": [*messages, choice["message"]]}), "and may be sent back as it came"
    chunks = [json.loads(x[6:]) for event in events for x in parts.chunks([(0, event)]) if x != DONE]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Look."
    assert [x["function"]["name"] for delta in deltas for x in delta.get("tool_calls", ())] == ["f"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_answer_that_was_cut_off_goes_on(api, served, monkeypatch):
    """Behind what the model saw before it; as what stands there, whose first word has no space that is not its own."""
    settings = {"temperature": 0, "max_tokens": 20}
    whole = say(api, "One; two", **settings).choices[0].message.content
    for cut in (1, 5, len(whole) - 1):
        begun = [{"role": "user", "content": "One; two"}, {"role": "assistant", "content": whole[:cut]}]
        told = tuple(Message(x["role"], x["content"]) for x in begun)
        ids = served.chat_ids(told, continues=True)
        before = served.chat_ids(told[:1])
        assert ids[: len(before)] == before
        assert served.tokenizer.decode(ids[len(before) :], continues=True) == whole[:cut]
        got = api.chat.completions.create(
            model="tiny", messages=begun, extra_body={"continue_final_message": True}, **settings
        )
        expected = alone(served, ids, max_new_tokens=20, **dataclasses.asdict(served.turn_ends))
        assert got.choices[0].message.content == text_of(expected)
    encode = type(served.tokenizer).encode  # as the older SentencePiece models have it
    monkeypatch.setattr(
        type(served.tokenizer), "encode", lambda self, text, **how: encode(self, " " + text, **how) if text else []
    )
    monkeypatch.setattr(served.tokenizer, "starts_with_space", True)
    ids = served.chat_ids((Message("user", "a"), Message("assistant", "cat")), continues=True)
    assert served.tokenizer.decode(ids, continues=True).endswith(":cat")


def test_a_prompt_longer_than_the_cache_is_read(api, served):
    prompt = np.random.default_rng(0).integers(3, 300, 700).tolist()
    got = complete(api, prompt)
    assert got.choices[0].text == text_of(alone(served, prompt, max_new_tokens=12))
    assert got.usage.prompt_tokens == 700


def test_64_clients_some_of_whom_go_away_leave_nothing_behind(server, api, served):
    """Whoever their neighbours are: the answers alone. And whoever leaves, leaves nothing."""
    rng = random.Random(0)
    asked = [random_request(rng) for _ in range(80)]
    leaves = {number: rng.randrange(1, 4) for number in rng.sample(range(80), 20)}
    threads = threading.active_count()

    def ask(number):
        chunks, text = api.completions.create(model="tiny", stream=True, **asked[number]), ""
        for count, chunk in enumerate(chunks):
            text += chunk.choices[0].text if chunk.choices else ""
            if leaves.get(number) == count:
                chunks.close()
                break
        return text

    before = server.worker.slots.cache_bytes
    with counted_compilations() as compiled, ThreadPoolExecutor(64) as pool:
        got = list(pool.map(ask, range(80)))
    assert compiled == []
    assert settled(server)
    assert server.worker.slots.cache_bytes == before
    assert threading.active_count() <= threads + 8  # those that tokenise
    for number, (text, wanted) in enumerate(zip(got, asked, strict=True)):
        expected = wanted_of(served, wanted)
        assert text == expected or (number in leaves and expected.startswith(text)), number


def test_scores_that_are_no_numbers_are_a_servers_error_and_the_server_goes_on():
    graph, params = split(tiny_model())
    table = np.array(params["embedding"]["embedding"])
    table[7] = np.nan
    params["embedding"]["embedding"] = jnp.asarray(table)
    engine = Generator(merge(graph, params), tiny_engine().tokenizer, tiny_engine().attention)
    with running(Served.create("tiny", engine, None, max_prompt_tokens=0)) as server:
        api = client(server)
        for prompt, n in (([5, 7], 1), ([*range(20, 90), 7, 8], 2)):
            with pytest.raises(openai.InternalServerError, match="scores of the next token are not numbers"):
                complete(api, prompt=prompt, n=n)
        assert settled(server)
        assert urllib.request.urlopen(f"{server.url}/health").status == 200
