"""What the openai client gets, against the engine alone."""

import pytest

from sepjax import Sampling
from tests.server.tiny import client, running, tiny_served


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.fixture(scope="module")
def server(served):
    with running(served, rows=4) as server:
        yield server


def test_first(server, served):
    api = client(server)
    got = api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "The cat"}], max_tokens=9, temperature=0
    )
    print(got)
    ids = served.tokenizer.encode("The cat", bos=True)
    got = api.completions.create(model="tiny", prompt="The cat", max_tokens=9, temperature=0, logprobs=0)
    print(got)
    expected = list(served.engine.stream(ids, max_new_tokens=9, bounded=True))
    assert got.choices[0].text == "".join(e.text for e in expected)
    got = list(
        api.completions.create(
            model="tiny", prompt="The cat", max_tokens=9, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    print(got[-2:])
    expected = list(served.engine.stream(ids, max_new_tokens=9, bounded=True, sampling=Sampling.create(1.0), seed=3))
    assert "".join(c.choices[0].text for c in got if c.choices) == "".join(e.text for e in expected)
    got = list(
        api.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "The cat"}],
            max_tokens=9,
            seed=3,
            stream=True,
            logprobs=True,
        )
    )
    print(got)
