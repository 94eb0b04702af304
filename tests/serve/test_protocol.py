"""What is read, what is refused, and how the refusal says which field it is."""

import asyncio
import re

import numpy as np
import pytest

from sepjax.generation.slots import SlotRequest
from sepjax.serve.errors import ApiError
from sepjax.serve.jobs import FairQueue, Inbox, Job
from sepjax.serve.protocol import chat_request, completion_request, detokenize_request, load_json, tokenize_request

HI = [{"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "arguments": '{"city": "Ulm"}'}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": FUNCTION}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def refusal(read, body):
    with pytest.raises(ApiError) as error:
        read(body)
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature=-1 must be a number of at least 0"),
        ("temperature", True, "temperature=true must be a number"),
        ("temperature", "1", 'temperature="1" must be'),
        ("temperature", 10**400, "temperature=1000"),
        ("top_p", 0, "top_p=0 must be a number above 0 and at most 1"),
        ("top_k", -2, "top_k=-2 must be a whole number from -1"),
        ("top_k", 1.5, "top_k=1.5 must be a whole number"),
        ("min_p", 2, "min_p=2 must be a number of at least 0 and at most 1"),
        ("n", 0, "n=0 must be a whole number from 1 to 128"),
        ("seed", 2**63, "seed=9223372036854775808 must be"),
        ("stop", ["a"] * 17, "stop=.* must be a string or a list of up to 16 strings"),
        ("stop", [""], "none of them empty"),
        ("stop", {"a": 1}, "must be a string or a list"),
        ("stop_token_ids", [-1], "a list of token ids"),
        ("stop_token_ids", 5, "a list of token ids"),
        ("max_tokens", 0, "max_tokens=0 must be a whole number from 1"),
        ("max_tokens", 2**21, "max_tokens=2097152 must be at most 1048576 for an answer in one piece; use stream=true"),
        ("stream", "yes", 'stream="yes" must be true or false'),
        ("stream_options", {"include_usage": True}, "left out without stream=true"),
        ("temprature", 1, "unknown field 'temprature'; did you mean 'temperature'"),
        ("a" * 500, 1, "unknown field 'aaaa"),
        ("user", 5, "user=5 must be a string"),
        (
            "response_format",
            {"type": "json_object"},
            "response_format=.*json_object.* is not supported.*: .*in the mess",
        ),
        ("include_stop_str_in_output", True, "include_stop_str_in_output=true is not supported"),
        ("service_tier", "flex", 'service_tier="flex" is not supported by this server; leave it out, or give "auto"$'),
        ("guided_json", {}, "guided_json={} is not supported"),  # any JSON, which not every text is
        ("metadata", "a", 'metadata="a" must be an object'),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    for read, body in ((completion_request, {"prompt": "a"}), (chat_request, {"messages": HI})):
        error = refusal(read, body | {field: value})
        assert error.param in (field, field[:80])
        assert re.search(message, error.message), error.message
        assert len(error.message) < 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages=[] must be a list of messages, one at least"),
        ({"messages": "Hi"}, 'messages="Hi" must be a list'),
        ({"messages": ["Hi"]}, 'messages[0]="Hi" must be a JSON object'),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            'messages[0].role="bot" must be one of system, user, assistant, tool',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "parts of type 'image_url' are not supp",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]: parts of type 'str'"),
        (
            {"messages": [*HI, {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0].function=null must be a JSON object",
        ),
        (
            {"messages": [CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            'tool_calls[0].function.arguments="[1]" must be a JSON object, or the text of one',
        ),
        (
            {"messages": [CALL | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]}]},
            "must be a JSON object, or the text of one",
        ),
        ({"messages": [CALL | {"role": "user"}]}, "messages[0].tool_calls=[{"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function=null must be an object with the name"),
        ({"messages": HI, "tools": [{"type": "web_search"}]}, 'tools[0].type="web_search" must be "function"'),
        (
            {"messages": HI, "tools": TOOLS, "tool_choice": "required"},
            'tool_choice="required" must be "auto" or "none"',
        ),
        ({"messages": HI, "tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls=false must be left out"),
        ({"messages": HI, "tools": TOOLS, "chat_template_kwargs": {"tools": []}}, "left out beside tools"),
        ({"messages": HI, "chat_template_kwargs": [1]}, "chat_template_kwargs=[1] must be an object"),
        ({"messages": HI, "web_search_options": {}}, "web_search_options={} is not supported"),
        ({"messages": [*HI, {"role": "user", "content": "a", "tool_call_id": "1"}]}, "it is of the role 'tool', and"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs=2 must be left out, or come with logprobs=true"),
        ({"messages": HI, "logprobs": 2}, "logprobs=2 must be true or false"),
        ({"messages": HI, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens=2 must be left out beside max_com"),
        ({"messages": HI, "prompt": "a"}, "unknown field 'prompt'"),
        ({"messages": HI, "continue_final_message": True}, "left out where the last message is not an answer's"),
        ({"messages": [ANSWER], "continue_final_message": True}, "behind other messages"),
        ({"messages": [*HI, ANSWER | {"reasoning_content": "b"}], "continue_final_message": True}, "left out where"),
        (
            {"messages": [*HI, ANSWER], "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt=true must be left out, or false",
        ),
        ({"messages": HI, "add_generation_prompt": False}, "add_generation_prompt=false must be left out, or true"),
        ([], "the request=[] must be a JSON object"),
    ],
)
def test_chats_that_cannot_be(body, message):
    assert message in refusal(chat_request, body).message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": []}, "prompt=[] must be a string, a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt[0]=1 must be a list of token ids"),
        ({"prompt": [[1], [-1]]}, "prompt[1]=[-1] must be a list of token ids"),
        ({"prompt": ["a"] * 129}, "a list of up to 128 of either"),
        ({"prompt": ["a"] * 128, "n": 2}, "n=2 must be so small that 128 prompts make up to 128 choices"),
        ({"prompt": "a", "best_of": 3}, "best_of=3 is not supported by this server beside n=1"),
        ({"prompt": "a", "echo": True}, "echo=true is not supported"),
        ({"prompt": "a", "suffix": "b"}, 'suffix="b" is not supported'),
        ({"prompt": "a", "logprobs": True}, "logprobs=true must be a whole number from 0 to 20"),
    ],
)
def test_completions_that_cannot_be(body, message):
    assert message in refusal(completion_request, body).message


def test_what_asks_for_nothing_is_no_mistake():
    """Clients send every field of theirs, and send back whole messages of ours."""
    answer = {
        "role": "assistant",
        "content": "Yes",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "metadata": {},
               "stop": None, "seed": None, "n": 1.0, "modalities": ["text"]}  # fmt: skip
    found = chat_request({"messages": [*HI, answer, *HI], **nothing, "add_generation_prompt": True})
    on = {"messages": [*HI, answer], "continue_final_message": True, "add_generation_prompt": False}
    assert (found.continues, chat_request(on).continues) == (False, True)
    said = [(message.role, message.content) for message in found.messages]
    assert said == [
        ("user", "Hi"),
        ("assistant", "Yes"),
        ("user", "Hi"),
    ]
    assert found.wanted.temperature == 1.0
    assert found.wanted.logprobs is None
    assert (
        completion_request({"prompt": "a", "echo": False, "suffix": "", "best_of": 2, "n": 2}).wanted.max_tokens == 16
    )
    assert completion_request({"prompt": "a", "seed": -1}).wanted.seed == 2**32 - 1


def test_a_conversation_with_tools_is_as_templates_read_it():
    """Arguments are objects there, and text in the API; a streamed call comes back with its index."""
    told = CALL | {"tool_calls": [CALL["tool_calls"][0] | {"index": 0}]}
    result = {"role": "tool", "tool_call_id": "c", "name": "f", "content": [{"type": "text", "text": "12 degrees"}]}
    found = chat_request({"messages": [*HI, told, result], "tools": TOOLS, "tool_choice": "none"})
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"city": "Ulm"}}}
    assert [message.for_template() for message in found.messages] == [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        result | {"content": "12 degrees"},
    ]
    assert (found.tools, found.finds_calls) == (tuple(TOOLS), False)
    assert chat_request({"messages": HI, "tools": TOOLS}).finds_calls
    assert not chat_request({"messages": HI, "tool_choice": "auto"}).finds_calls


def test_what_clients_of_others_write_at_its_defaults_is_no_mistake():
    """vLLM's fields, hints for a cache of prompts, and labels; `user` has a newer name."""
    alike = {"skip_special_tokens": True, "spaces_between_special_tokens": True, "length_penalty": 1.0, "priority": 0,
             "include_stop_str_in_output": False, "use_beam_search": False, "return_token_ids": False, "echo": False,
             "bad_words": [], "guided_json": None, "metadata": {"a": "b"}, "prompt_cache_key": "a", "best_of": 1,
             "stream_options": {"include_usage": False, "include_obfuscation": False}}  # fmt: skip
    completion = completion_request({"prompt": "a", "add_special_tokens": True, **alike, "user": "a"})
    assert completion == completion_request({"prompt": "a", "user": "a"})
    parts = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    said = {"messages": [{"role": "user", "content": parts}], "add_special_tokens": False, "verbosity": "medium"}
    chat = chat_request({**said, **alike, "safety_identifier": "a", "top_logprobs": 0, "include_reasoning": True})
    assert chat == chat_request({"messages": HI, "user": "a"})


def test_names_of_those_who_speak_are_for_the_template():
    (message,) = chat_request({"messages": [{"role": "user", "name": "Bob", "content": "Hi"}]}).messages
    assert message.for_template() == {"role": "user", "content": "Hi", "name": "Bob"}


def test_bodies_that_are_not_json():
    for body in (b"", b"{", b'{"a": NaN}', b'{"a": [-1e999]}', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        assert "the body is not valid JSON" in refusal(load_json, body).message
    said = refusal(load_json, b'{"n": 1, "x": {"stop": 1, "stop": 2}}').message
    assert said == "the body is not valid JSON: 'stop' is there twice in one object"
    for read, body in (
        (tokenize_request, {}),
        (tokenize_request, {"prompt": "a", "messages": HI}),
        (tokenize_request, {"messages": HI, "add_special_tokens": False}),
        (detokenize_request, {}),
    ):
        refusal(read, body)


def test_clients_take_turns():
    """One that asks for much waits for itself, not others for it."""
    queue, loop = FairQueue(), asyncio.new_event_loop()
    inbox = Inbox(loop)
    for client, choice in [("a", i) for i in range(5)] + [("b", 0), ("c", 0), ("b", 1)]:
        queue.put(Job(inbox, choice, np.zeros(1, np.int32), SlotRequest("a"), client, 0.0))
    turns = [(job.client, job.choice) for job in iter(queue.pop, None)]
    assert turns == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3), ("a", 4)]
    assert len(queue) == 0
    loop.close()
