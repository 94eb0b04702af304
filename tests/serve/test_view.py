"""GET /v1/cache/ID: which tokens of a text the cache behind a response holds. And conversations over watched ones."""

import numpy as np
import pytest

from sepjax.serve.conversations import Entry
from sepjax.serve.view import described
from tests.serve.test_conversations import complete, talk
from tests.serve.test_operations import ask
from tests.serve.tiny import running, tiny_served

PROMPT = np.random.default_rng(5).integers(3, 300, 90).tolist()


# A server of its own is nine programs. Watched rows are described in test_layers_of_several_sizes..., and saved, read
# and gone on with in generation/cache/test_mixed.py.
@pytest.mark.parametrize("pattern", ["separator", pytest.param("watched", marks=pytest.mark.soak)])
def test_it_says_what_the_cache_holds(pattern, tmp_path):
    """Against the positions that the engine's own view gives; from memory, and read from disk by another server."""
    served = tiny_served(pattern=pattern, **({"watch_after": 2} if pattern == "watched" else {}))
    with running(served, state=str(tmp_path / "state")) as server:
        got = complete(server, PROMPT)
        entry = server.worker.conversations.get(got.id)
        view = entry.row.view()
        status, headers, said = ask(server, f"/v1/cache/{got.id}")
        assert (status, headers["cache-control"]) == (200, "no-store")
        assert [token["id"] for token in said["tokens"]] == entry.token_ids
        text = "".join(token["text"] for token in said["tokens"] if "control" not in token)
        assert text == served.text_of(tuple(entry.token_ids))
        states = [token["state"] for token in said["tokens"]]
        held = [i for i, state in enumerate(states) if state in ("sink", "kept", "recent")]
        every = [view.positions(layer) for layer in range(view.num_sets[0])]
        assert held == np.unique(np.concatenate(every)).tolist()
        assert states[-1] == "new", "drawn, and not taken up"
        assert states.count("sink") == said["sinks"] == served.sizes.num_sinks
        assert states.count("recent") == said["recent"]
        assert said["held"] == view.held <= said["size"] == served.cache_size
        assert (said["layers"], said["heads"]) == view.num_sets
        assert states.count("evicted") > 40
        for layer in range(view.num_sets[0]):
            one = ask(server, f"/v1/cache/{got.id}?layer={layer}")[2]["tokens"]
            held = [i for i, token in enumerate(one[:-1]) if token["state"] != "evicted"]
            assert held == view.positions(layer).tolist()
        if pattern == "watched":
            assert view.num_sets != (1, 1)
            everywhere = set.intersection(*(set(x.tolist()) for x in view.kept_positions.reshape(-1, view.kept)))
            both = ask(server, f"/v1/cache/{got.id}?layer=all")[2]["tokens"]
            assert {i for i, token in enumerate(both) if token["state"] == "kept"} == everywhere
            shares = sum(token.get("share", 0) for token in said["tokens"])
            assert shares == pytest.approx(view.kept, abs=0.01), "each set keeps so many"
    with running(served, state=str(tmp_path / "state")) as server:
        assert ask(server, f"/v1/cache/{got.id}")[2] == said


@pytest.mark.soak  # rows of watched tokens are saved and go on in generation/cache/test_mixed.py
def test_conversations_over_watched_tokens_go_on_from_their_cache():
    """As those over other caches in test_conversations.py."""
    served = tiny_served(pattern="watched", watch_after=2)
    with running(served) as server:
        talk(server, served, 4)
        talk(server, served, 2, temperature=1.3, seed=4)


def test_what_was_let_go_long_ago_is_counted(served):
    with running(served) as server:
        got = complete(server, PROMPT)
        whole = ask(server, f"/v1/cache/{got.id}?last=65536")[2]["tokens"]
        for last in (0, 7, 60):
            tokens = ask(server, f"/v1/cache/{got.id}?last={last}")[2]["tokens"]
            written = [token for token in tokens if "omitted" not in token]
            assert sum(token.get("omitted", 1) for token in tokens) == len(whole)
            expected = [t for i, t in enumerate(whole) if t["state"] != "evicted" or i >= len(whole) - last]
            assert [(t["id"], t["state"]) for t in written] == [(t["id"], t["state"]) for t in expected]


@pytest.mark.parametrize(
    ("pattern", "size"), [("separator", 5), pytest.param("sink_window", 90, marks=pytest.mark.soak)]
)
def test_a_cache_that_keeps_nothing_between_its_ends_is_described(pattern, size):
    served = tiny_served(pattern=pattern)
    stream = served.engine.stream(PROMPT[:size], bounded=True, max_new_tokens=1)
    assert list(stream)
    row = stream.saved()
    ids = np.array(PROMPT[:size], np.int32)
    entry = Entry("key", b"", ids, None, row, 0)
    for layer in ("any", "all", "0"):
        said = described(served, entry, row.views(), layer=layer, last="100")
        states = [token["state"] for token in said["tokens"]]
        assert (said["kept"], states.count("kept")) == (0, 0)
        assert len(states) - states.count("evicted") - states.count("new") == said["held"] > 0


@pytest.mark.soak  # programs of their own; caches of several sizes: cache/test_mixed.py
def test_layers_of_several_sizes_have_the_model_s_numbers_and_each_kind_its_slots():
    """The first layer has a window alone, the second one keeps tokens: each is what its own part of the row holds."""
    served = tiny_served(pattern="watched", watch_after=2, layer_windows=(9, 6), kept_layers=(1,))
    stream = served.engine.stream(PROMPT, bounded=True, max_new_tokens=1)
    assert list(stream)
    row, ids = stream.saved(), np.array(PROMPT, np.int32)
    entry, places = Entry("key", b"", ids, None, row, 0), {}
    for layer in ("0", "1", "any", "all"):
        said = described(served, entry, row.views(), layer=layer, last="100")
        places[layer] = {i for i, token in enumerate(said["tokens"]) if token["state"] not in ("evicted", "new")}
        assert (said["layers"], len(said["kinds"])) == (2, 2)
        if layer.isdigit():
            (kind,) = (kind for kind in said["kinds"] if kind["layers"] == [int(layer)])
            assert {name: said[name] for name in kind if name != "layers"} == {
                name: x for name, x in kind.items() if name != "layers"
            }
            assert len(places[layer]) >= kind["held"] > 0
        if layer == "1":  # whose two heads keep sets of their own
            kept = {i: token["share"] for i, token in enumerate(said["tokens"]) if token["state"] == "kept"}
    views = {served.sizes.layers(i): view for i, view in enumerate(row.views())}
    assert places["0"] == set(views[0,].positions().tolist())
    assert places["1"] == set(views[1,].positions().tolist())
    assert places["any"] == places["0"] | places["1"] != places["1"]
    assert places["all"] <= places["0"] & places["1"]
    assert views[0,].kept == 0 < views[1,].kept
    assert said["size"] == served.cache_size
    heads = [{*x.tolist()} for x in views[1,].kept_positions[0]]
    assert heads[0] != heads[1], "else this sees little"
    assert kept == {i: (int(i in heads[0]) + int(i in heads[1])) / 2 for i in heads[0] | heads[1]}


def test_refusals(served):
    with running(served) as server:
        got = complete(server, PROMPT)
        for query, status, code in (
            ("?layer=1", 400, "invalid_value"), ("?layer=x", 400, "invalid_value"), ("?last=-1", 400, "invalid_value"),
            ("?last=99999", 400, "invalid_value"), ("?lst=1", 400, "unknown_field"), ("x", 404, "cache_not_kept"),
        ):  # fmt: skip
            answer = ask(server, f"/v1/cache/{got.id}{query}")
            assert (answer[0], answer[2]["error"]["code"]) == (status, code), query
    with running(served, cache_memory=0) as server:
        assert "keeps no conversations" in ask(server, f"/v1/cache/{complete(server, [5]).id}")[2]["error"]["message"]
    with running(served, api_key="secret") as server:
        assert ask(server, f"/v1/cache/{got.id}")[0] == 401


@pytest.fixture(scope="module")
def served():
    return tiny_served()
