"""lm-eval's own tasks on local data: prompts and scoring are its, log-probabilities and answers ours."""

import dataclasses
import importlib
import json
import random
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sepjax.config import ConfigError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.scoring import score_continuations
from sepjax.generation.engine import Generator
from sepjax.hub.chat_template import ChatTemplate
from sepjax.model.transformer import merge, split
from tests.data.test_special_tokens import LLAMA3, write

pytest.importorskip("lm_eval")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of lm-eval and what it imports
    import lm_eval.evaluator

    from sepjax.evaluation import tasks
    from sepjax.evaluation.gold import NATS, Gold, gold_answers, nats_per_token
    from sepjax.evaluation.lm_eval_data import TaskDataError, local_datasets
    from sepjax.evaluation.lm_eval_model import RequestError, SepjaxLM, _changed
    from sepjax.evaluation.tasks import TaskError

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["the", "cat,", "a", "dog.", "One", "bird;", "and", "fish!", "Where", "is", "it?", "Here:", "there."]


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders in the hub's form and in the short one."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = {
        "lambada/lambada_test": [{"text": sentence(rng, 12)} for _ in range(5)],
        "gsm8k/test": [{"question": sentence(rng, 8), "answer": "#### 7"} for _ in range(3)],
        "piqa/validation": [
            {"query": f"Question: {sentence(rng, 9)}", "choices": ["a", "some, too."], "gold": i % 2} for i in range(4)
        ],
        "winogrande/validation": [
            {"context_options": ["She saw Ann so Ann", "She saw Ann so Anna"], "continuation": "left, then.", "gold": 1}
        ],
        "arc_easy/test": [{"query": "Question: Why? Or, who?", "choices": ["a", "", "c"], "gold": 2}],  # one is empty
        "mmlu/mmlu_test": [
            {"subject": s, "question": sentence(rng, 9), "choices": list("wxyz"), "answer": 1}
            for s in ("anatomy", "virology") for _ in range(2)
        ],
        "mmlu/mmlu_dev": [
            {"subject": s, "question": "What?", "choices": list("wxyz"), "answer": i}
            for s in ("anatomy", "virology") for i in range(4)
        ],
    }  # fmt: skip
    for name, values in rows.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return root


@pytest.fixture(scope="module")
def separators(byte_model):
    return dataclasses.replace(byte_model.attention, cache_size=0)


def run(model, tokenizer, names, patterns, data, **settings):
    settings = {"batch_tokens": 2048, "batch_size": 2} | settings
    return list(tasks.run_tasks(model, tokenizer, names, patterns, data=data, **settings))


def test_scores_are_those_of_a_manual_computation(byte_model, byte_tokenizer, separators, data):
    (score,) = run(byte_model, byte_tokenizer, ["lambada_openai"], [separators], data)
    texts = [json.loads(line)["text"] for line in (data / "lambada/lambada_test.jsonl").read_text().splitlines()]
    pairs = [text.rsplit(" ", 1) for text in texts]
    requests = [(byte_tokenizer.encode(a), byte_tokenizer.encode(f" {b}")) for a, b in pairs]
    found = score_continuations(byte_model, byte_tokenizer, requests, separators)
    expected = np.exp(-np.mean([x.logprob for x in found]))
    assert score.metrics["perplexity,none"] == pytest.approx(expected, rel=1e-4)
    assert score.metrics["acc,none"] == np.mean([x.is_greedy for x in found])
    assert score.kv_kept == pytest.approx(np.mean([x.held / x.seen for x in found]))
    assert score.errors["perplexity,none"] > 0
    nats, tokens = [-x.logprob for x in found], [len(ids) for _, ids in requests]
    assert score.metrics[NATS] == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
    assert 0 < score.errors[NATS] < score.metrics[NATS]
    assert (score.documents, score.requests, score.refused) == (5, 5, "")
    assert score.tokens == sum(x.seen for x in found)
    assert 0 < score.tokens_per_second < np.inf
    assert 0 < score.kv_kept < 0.9


@pytest.mark.soak  # a batch's programs; bounded batches are in generation/test_engine.py
def test_answers_come_from_the_cache_that_evicts(byte_model, byte_tokenizer, separators, data, monkeypatch):
    prompts = []
    original = Generator.generate

    def spy(engine, ids, **settings):
        prompts.extend(ids)
        return original(engine, ids, **settings | {"max_new_tokens": 6})

    monkeypatch.setattr(Generator, "generate", spy)
    (score,) = run(byte_model, byte_tokenizer, ["gsm8k_cot"], [separators], data, limit=2, num_fewshot=1)
    assert score.metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract", NATS}
    engine = Generator(byte_model, byte_tokenizer, separators)
    answers = original(engine, prompts, max_new_tokens=6, stop=["Q:", "</s>", "<|im_end|>"])
    assert score.kv_kept == pytest.approx(np.mean([a.cache.held / a.cache.seen for a in answers]))
    assert score.kv_kept < 0.5
    assert score.generated == sum(len(a.token_ids) for a in answers)
    gold = [(ids, byte_tokenizer.encode(" 7")) for ids in prompts]  # the reference, as it stands behind a prompt
    found = score_continuations(byte_model, byte_tokenizer, gold, separators)
    assert score.metrics[NATS] == pytest.approx(-sum(x.logprob for x in found) / sum(len(b) for _, b in gold), rel=1e-5)
    assert score.tokens == sum(a.cache.seen for a in answers) + sum(x.computed for x in found)
    text = byte_tokenizer.decode(prompts[0])
    assert text.startswith("Q: There are 15 trees in the grove.")  # lm-eval's own prompt
    assert text.endswith("\nA:")


@pytest.mark.soak  # windows of equal caches are in test_scoring.py
def test_equal_kv_and_groups(byte_model, byte_tokenizer, separators, data):
    patterns = [dataclasses.replace(separators, pattern=p) for p in ("dense", "separator", "sink_window")]
    with local_datasets(data):
        manager = tasks._manager("mmlu_virology")
    assert "mmlu" in manager.all_tasks
    scores = run(byte_model, byte_tokenizer, ["mmlu_virology"], patterns, data, num_fewshot=2)
    dense, kept, window = scores
    assert (dense.kv_kept, dense.pattern, dense.documents, dense.requests) == (1, "dense", 2, 8)
    assert window.kv_kept == pytest.approx(kept.kv_kept, abs=0.01)
    assert window.window_size > kept.window_size
    assert all("acc,none" in s.metrics for s in scores)
    assert "not reported" not in tasks.table(scores)


def test_right_answers_are_those_the_tasks_score_by(data):
    names = ["winogrande", "arc_easy", "piqa"]
    with tasks.metrics_package(), local_datasets(data):
        loaded = {}
        for name in names:
            loaded |= tasks._Noting(tasks._manager(name)).load([name])["tasks"]

    def row(name, number=0):
        task = loaded[name]
        task.build_all_requests(limit=2, rank=0, world_size=1)
        asked = [x for x in task.instances if x.doc_id == number]
        return {
            "doc_id": number,
            "doc": asked[0].doc,
            "target": task.doc_to_target(asked[0].doc),
            "arguments": [x.args for x in asked],
            "resps": [[(-float(i + 1), False)] for i in range(len(asked))],
        }

    rows = {"winogrande": [row("winogrande")] * 2, "arc_easy": [row("arc_easy")], "piqa": [row("piqa"), row("piqa", 1)]}
    found = gold_answers(loaded, rows)
    assert [(x.context[-8:], x.continuation, x.logprob) for x in found] == [
        (" so Anna", " left, then.", -2.0),  # the contexts differ, and a document that two filters logged counts once
        ("\nAnswer:", " c", -3.0),
        ("\nAnswer:", " a", -1.0),
        ("\nAnswer:", " some, too.", -2.0),
    ]
    rows["arc_easy"][0]["target"] = 7
    assert len(gold_answers(loaded, rows)) == len(found) - 1  # a document that names no choice
    assert isinstance(found[0], Gold)
    assert nats_per_token([3.0, 1.0], [1, 1]) == (2.0, 1.0)
    assert nats_per_token([3.0], [2]) == (1.5, None)


def test_without_compression_there_is_no_score(byte_model, byte_tokenizer, separators, data):
    wide = dataclasses.replace(separators, window_size=500)
    (piqa,) = run(byte_model, byte_tokenizer, ["piqa"], [wide], data)
    assert (piqa.metrics, piqa.errors, piqa.kv_kept) == ({}, {}, 1)
    assert "nothing was compressed" in piqa.refused
    assert "not reported: nothing was compressed" in tasks.table([piqa])


def test_short_rows_are_spelt_out_for_the_tasks(byte_model, byte_tokenizer, separators, data):
    narrow = dataclasses.replace(separators, window_size=3, num_sinks=1)
    for name, documents, requests in (("piqa", 4, 8), ("winogrande", 1, 2), ("arc_easy", 1, 3)):
        (score,) = run(byte_model, byte_tokenizer, [name], [narrow], data)
        assert (score.documents, score.requests, score.refused) == (documents, requests, "")
    with local_datasets(data):
        import datasets

        (row,) = datasets.load_dataset("allenai/winogrande", "winogrande_xl")["validation"]
        assert row == {"sentence": "She saw Ann so _ left, then.", "option1": "Ann", "option2": "Anna", "answer": "2"}
        (row,) = datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")["test"]
        assert row["answerKey"] == "C"
        assert len(datasets.load_dataset("cais/mmlu", "anatomy")["dev"]) == 4


def test_missing_datasets_are_named(byte_model, byte_tokenizer, separators, data):
    with pytest.raises(TaskDataError, match=r"no folder for the dataset .*hellaswag; it has arc_easy, gsm8k"):
        run(byte_model, byte_tokenizer, ["hellaswag"], [separators], data)


def test_damaged_data_and_unknown_names_are_named(byte_model, byte_tokenizer, separators, tmp_path, data):
    (tmp_path / "piqa").mkdir()
    for content, message in (("{", "line 1, is not JSON"), ("[1]", "line 1, is a list"), ("\n", "no rows")):
        (tmp_path / "piqa" / "validation.jsonl").write_text(content)
        with pytest.raises(TaskDataError, match=message):
            run(byte_model, byte_tokenizer, ["piqa"], [separators], tmp_path)
    row = {"query": "?", "choices": ["only one"], "gold": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(row))
    with pytest.raises(TaskDataError, match="not in its short form"):
        run(byte_model, byte_tokenizer, ["piqa"], [separators], tmp_path)
    (tmp_path / "piqa" / "validation.jsonl").rename(tmp_path / "piqa" / "other.jsonl")
    row = {"goal": "?", "sol1": "a", "sol2": "b", "label": 0}
    (tmp_path / "piqa" / "other.jsonl").write_text(json.dumps(row))
    with pytest.raises(TaskDataError, match=r"no split 'validation', only other\.jsonl"):
        run(byte_model, byte_tokenizer, ["piqa"], [separators], tmp_path)
    with pytest.raises(TaskDataError, match="no folder"):
        run(byte_model, byte_tokenizer, ["piqa"], [separators], tmp_path / "nothing")
    with pytest.raises(ConfigError, match="did you mean 'separator'"):
        _changed(separators, "separators", 0, 2)


def test_an_empty_continuation_is_certain_and_ends_nothing(byte_model, byte_tokenizer, separators):
    from lm_eval.api.instance import Instance

    lm = SepjaxLM(byte_model, byte_tokenizer, separators)
    pairs = [("A cat", " sat."), ("A cat", ""), ("", ""), ("  ", "sat."), ("", "A dog")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests)
    assert found[1] == found[2] == (0.0, True)
    asked = [(byte_tokenizer.encode("A cat"), byte_tokenizer.encode(" sat.")), ([0], byte_tokenizer.encode("  sat."))]
    expected = score_continuations(byte_model, byte_tokenizer, asked, separators)
    for got, x in zip((found[0], found[3]), expected, strict=True):
        assert got[0] == pytest.approx(x.logprob, abs=1e-4)
    assert lm.uses.keys() == {id(requests[i]) for i in (0, 3, 4)}
    assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)]) == [0.0]


def test_answers_and_scores_share_one_copy_of_the_weights(byte_model, byte_tokenizer, separators, monkeypatch):
    """Those laid out for answers score, too, once a task has asked for answers."""
    from lm_eval.api.instance import Instance

    monkeypatch.setattr("sepjax.generation.prepared._LARGE", 0)
    graph, params = split(byte_model)
    model = merge(graph, jax.tree.map(jnp.copy, params))
    lm = SepjaxLM(model, byte_tokenizer, separators, consume=True)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([("A cat", " sat."), ("", "A dog")])]
    expected = lm.loglikelihood(requests)
    layers = jax.tree.leaves(split(model)[1]["layers"])
    assert not any(x.is_deleted() for x in layers)
    assert lm._engine.attention == separators
    assert all(x.is_deleted() for x in layers)
    for got, before in zip(lm.loglikelihood(requests), expected, strict=True):
        assert got == (pytest.approx(before[0], abs=1e-4), before[1])


def test_a_limit_may_be_a_share(byte_model, byte_tokenizer, separators, data):
    for limit, documents in ((0.5, 3), (2, 2), (1.0, 1)):  # of 5, rounded up as lm-eval does
        (score,) = run(byte_model, byte_tokenizer, ["lambada_openai"], [separators], data, limit=limit)
        assert score.documents == documents
    for limit in (1.5, -1, float("nan")):
        with pytest.raises(TaskError, match="whole number of documents, or their share"):
            run(byte_model, byte_tokenizer, ["lambada_openai"], [separators], data, limit=limit)


def test_a_rendered_prompt_has_one_bos(byte_model, tmp_path, separators):
    """A text begins with BOS where the tokenizer puts it, and not twice where a chat template has written it."""
    named = {"tokenizer_config": {"bos_token": LLAMA3[0], "eos_token": LLAMA3[2], "chat_template": "{{ bos_token }}a"}}
    tokenizer = Tokenizer.load(write(tmp_path, LLAMA3, bos=LLAMA3[:1], **named))
    lm = SepjaxLM(byte_model, tokenizer, separators, chat_template=ChatTemplate.of(tokenizer))
    text = lm.apply_chat_template([{"role": "user", "content": "x"}])
    assert lm.tok_encode(text) == lm.tok_encode("a") == [256, *tokenizer.encode("a")]
    assert lm.tok_encode("a", add_special_tokens=False) == tokenizer.encode("a")
    assert lm._pair("", text) == ([256], tokenizer.encode("a"))


def test_rolling_scores_and_settings_that_are_not_served(byte_model, byte_tokenizer, separators):
    from lm_eval.api.instance import Instance

    lm = SepjaxLM(byte_model, byte_tokenizer, separators)
    text = "A cat, a dog. And so on."
    ids = byte_tokenizer.encode(text)
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    (whole,) = score_continuations(byte_model, byte_tokenizer, [([0], ids)], separators)
    assert found == pytest.approx(whole.logprob, abs=1e-4)
    for settings in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(RequestError, match="only greedy"):
            lm.generate_until([Instance("generate_until", {}, ("a", settings), 0)])
    with pytest.raises(RequestError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert lm_eval.evaluator


def test_metrics_are_of_the_package_evaluate_and_not_of_our_file(tmp_path, monkeypatch):
    """The folder of evaluate.py stands first in sys.path when that is run."""
    for folder in ("checkout", "installed/evaluate"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "checkout/evaluate.py").write_text("")
    (tmp_path / "installed/evaluate/__init__.py").write_text("import importlib, evaluate.loading\nload = 'theirs'\n")
    (tmp_path / "installed/evaluate/loading.py").write_text("")
    path = [str(tmp_path / "checkout"), str(tmp_path / "installed"), *sys.path]
    monkeypatch.setattr(sys, "path", path[:])
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate"]:
        monkeypatch.delitem(sys.modules, name)
    ours = importlib.import_module("evaluate")
    assert ours.__file__ == str(tmp_path / "checkout/evaluate.py")
    for _ in range(2):
        with tasks.metrics_package():
            assert importlib.import_module("evaluate").load == "theirs"
        assert sys.path == path
        assert importlib.import_module("evaluate") is ours
    del sys.modules["evaluate"]
    monkeypatch.setattr(tasks, "_manager", lambda task: None)
    found = lambda *_, **__: {"load": importlib.import_module("evaluate").load, "samples": {}}  # noqa: E731
    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", found)
    assert tasks._evaluate(None, "humaneval", None, 0, None, False) == ({"load": "theirs", "samples": {}}, [])
    with tasks.metrics_package():  # nobody's was there before, and so it stays
        assert importlib.import_module("evaluate").load == "theirs"
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate"]:
        del sys.modules[name]  # monkeypatch puts back what was there
