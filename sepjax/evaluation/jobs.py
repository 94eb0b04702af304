"""The jobs of `sepjax evaluate`, from a path to scores: load, read the texts, score."""

import dataclasses
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sepjax import files
from sepjax.config import PATTERNS, AttentionConfig, ConfigError
from sepjax.console import say
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation import compare, needle, perplexity, streaming, tasks
from sepjax.evaluation.arms import Arm, fixed_arms, parse_arms, plain_arms, stream_attention
from sepjax.evaluation.documents import check_documents, has_records, read_documents, read_texts
from sepjax.evaluation.equal import density as window_density
from sepjax.evaluation.inputs import (
    Texts,
    base_of_arms,
    config_of,
    corpus_of,
    in_shares,
    is_trained,
    texts_of,
    with_pattern,
)
from sepjax.generation import limits
from sepjax.hub.chat_template import ChatTemplate
from sepjax.loading import load, locate
from sepjax.model.transformer import Transformer
from sepjax.pictures.canvas import PictureError


def evaluate(
    workdir: Path,
    patterns: Sequence[str] = (),
    *,
    arms: str = "",
    equal: str = "",
    step: int | None = None,
    text: str = "",
    text_key: str = "",
    split: str = "",
    length: int = 0,
    window_size: int = 0,
    max_documents: int = 0,
    max_tokens: int = 0,
    bos: bool = True,
    batch_size: int = 8,
    baseline: str = "",
    near: int = 0,
    far: int = 0,
    **settings: Any,
) -> list[compare.Score]:
    """Scores a run or a pretrained model under each of `patterns`, or all that it can run; 0 and "": its own settings.

    `arms` (`sepjax.evaluation.arms`) take the place of `patterns`, and so does `equal`: all patterns at the separators'
    "kv" or "pairs". Further `settings` are those of `sepjax.load`.
    """
    model, tokenizer = load(workdir, step=step, **settings)
    config = config_of(workdir, model)
    if text_key and Path(text).exists() and not has_records(Path(text)):
        raise ConfigError(f"--text_key={text_key} does nothing for --text={text}, which has no fields; leave it out")
    data = dataclasses.replace(config.data, text_key=text_key or config.data.text_key)
    config = dataclasses.replace(config, data=data)
    patterns = patterns or [pattern for pattern in PATTERNS if pattern != "gated" or model.gate is not None]
    attentions = [with_pattern(config, pattern, window_size) for pattern in ([] if arms else ["separator", *patterns])]
    texts = texts_of(workdir, config, tokenizer, text, split, max_documents)
    length = length or config.data.sequence_length
    start = tokenizer.document_start if is_trained(workdir) else None
    windows = _windows(tokenizer, texts, length, bos=bos, max_tokens=max_tokens, start=start)
    if arms:
        compared = parse_arms(arms, base_of_arms(config, window_size), config.model.num_layers)
    elif equal:
        density = window_density(attentions[0], tokenizer, windows.ids)
        compared = compare.at_equal_kv(attentions[0], density, equal)
    else:
        compared = plain_arms(attentions[1:])

    def other(path: str) -> tuple[Transformer, Tokenizer]:
        return load(path, **settings) if path else (model, tokenizer)

    cut = {"length": length, "batch_size": batch_size}
    return compare.score_arms(other, windows, compared, baseline=baseline, near=near, far=far, **cut)


def _windows(tokenizer: Tokenizer, texts: Sequence[Texts], length: int, **cut: Any) -> perplexity.TextWindows:
    """Of a mixture those of each part in its share, up to the end of the one that ends first."""
    parts = [perplexity.token_windows(tokenizer, x.documents, length, loss_on=x.loss_on, **cut) for x in texts]
    if len(parts) == 1:
        return parts[0]
    counts = in_shares([x.share for x in texts], [len(part.ids) for part in parts])
    said = ", ".join(f"{count:,} of {x.name}" for count, x in zip(counts, texts, strict=True))
    say(f"scoring {sum(counts):,} windows of the mixture: {said}")
    taken = (part.first(count, tokenizer) for part, count in zip(parts, counts, strict=True))
    return perplexity.TextWindows.join([part for part in taken if part.ids])


def stream(
    path: Path,
    patterns: Sequence[str],
    budgets: Sequence[str],
    *,
    step: int | None = None,
    text: str = "",
    split: str = "",
    line_wise: bool = False,
    max_tokens: int = 0,
    arms: str = "",
    loading: Mapping[str, Any] = types.MappingProxyType({}),
    **options: Any,
) -> list[streaming.StreamScore]:
    """Streams text through the bounded cache of each pattern and budget "a/s/w/c"; no budget: the model's own.

    `arms` take the place of patterns and budgets. `loading` is for `sepjax.load`, `options` for `score_streams`.
    """
    if text and split:
        raise ConfigError(f"--split={split} is of a run's own corpus; a stream of --text takes all of it")
    if text:
        check_documents(Path(text))
    model, tokenizer = load(path, **{"step": step, **loading})
    attentions: list[AttentionConfig | Arm] = [
        stream_attention(model.attention, pattern, budget, model.config.num_layers)
        for budget in budgets or [""]
        for pattern in patterns
    ]
    if arms:
        attentions = [*fixed_arms(arms, model.attention, model.config.num_layers, cached=True)]
    trained = limits.trained_length(locate(path), model.config)
    for arm in attentions:
        limits.warn_of_cache(model.config, arm.attention if isinstance(arm, Arm) else arm, trained)
    cut = {"line_wise": line_wise, "max_tokens": max_tokens, "as_in_training": is_trained(path)}
    began = time.perf_counter()
    documents = read_documents(Path(text), tokenizer, **cut) if text else corpus_of(path, split, tokenizer, **cut)
    seconds = time.perf_counter() - began
    scores = streaming.score_streams(model, tokenizer, documents, attentions, consume=True, **options)
    return [dataclasses.replace(score, tokenise_seconds=seconds) for score in scores]


def find_needles(
    path: Path,
    patterns: Sequence[str],
    *,
    text: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    tails: Sequence[int] = (0,),
    arms: str = "",
    window_size: int = 0,
    trials: int = 10,
    batch_tokens: int = 65_536,
    **settings: Any,
) -> list[needle.Cell]:
    """Hides needles in the joined texts of `text`; further `settings` are those of `sepjax.load`."""
    if not text:
        raise ConfigError("needles are hidden in --text: give it a .txt file or a folder of them")
    haystack = "\n\n".join(read_texts(Path(text)))
    model, tokenizer = load(path, **settings)
    config = config_of(path, model)
    if arms:
        compared = fixed_arms(arms, base_of_arms(config, window_size), config.model.num_layers)
    else:
        compared = plain_arms([with_pattern(config, pattern, window_size) for pattern in patterns])
    grid = {"lengths": lengths, "depths": depths, "tails": tails, "trials": trials, "batch_tokens": batch_tokens}
    first = tokenizer.document_start if is_trained(path) else None
    start = None if first is None else [first]
    return needle.needle_grid(model, tokenizer, haystack, compared, start=start, **grid)


def run_tasks(
    path: Path, names: Sequence[str], patterns: Sequence[str], *, window_size: int = 0, **options: Any
) -> list[tasks.TaskScore]:
    """Runs tasks of lm-eval; `options` are those of `sepjax.evaluation.tasks.run_tasks` and `sepjax.load`."""
    tasks.require_lm_eval()
    loading = {name: options.pop(name) for name in ("step", "dtype", "weight_dtype", "download") if name in options}
    model, tokenizer = load(path, **loading)
    attentions = [
        dataclasses.replace(with_pattern(config_of(path, model), pattern, window_size), cache_size=0)
        for pattern in patterns
    ]
    template = ChatTemplate.of_model(locate(path), tokenizer) if options.get("apply_chat_template") else None
    scores = []
    options |= {"chat_template": template, "consume": True}
    for score in tasks.run_tasks(model, tokenizer, names, attentions, **options):
        scores.append(score)
        print(tasks.table([score]), flush=True)
    return scores


def write_files(output: Path, what: Any, scores: Sequence[Any]) -> str:
    """Writes `what`'s CSV and picture beside `output`; returns what to say about it."""
    output.parent.mkdir(exist_ok=True)
    with files.replacing(output.with_suffix(".csv")) as partial:
        what.write_csv(partial, scores)
    try:
        with files.replacing(output.with_suffix(".png")) as partial:
            what.write_png(partial, scores)
    except PictureError as error:
        return f"{output.with_suffix('.csv')} (no picture: {error})"
    return f"{output.with_suffix('.csv')}, {output.with_suffix('.png')}"
