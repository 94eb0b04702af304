"""Texts that a run writes, for its report: kept in <workdir>/samples/step<N>_<digest of what was asked>.json."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from sepjax.config import ConfigError
from sepjax.data.conversations import NoFormError
from sepjax.data.tokenizer import Tokenizer
from sepjax.files import write_text
from sepjax.measure import provenance
from sepjax.progress import working
from sepjax.report.record import SAMPLES

_BEGINNING = 16  # tokens of a document that a sample continues


def write_samples(
    workdir: Path, count: int, prompts: Sequence[str], max_new_tokens: int, *, apply_chat_template: bool = False
) -> Path:
    """Has the newest checkpoint of a run continue texts, and writes what comes; returns the file.

    Other prompts or settings are another file, and the same ones again replace theirs.

    Args:
      workdir: of a run.
      count: samples.
      prompts: texts to continue, in turn; none: the beginnings of documents of the run's evaluation split.
      max_new_tokens: of each.
      apply_chat_template: whether prompts are what a user says, in the model's chat template.

    Raises:
      ConfigError: the run was trained on conversations and there are no prompts, or it has no chat template.
    """
    import sepjax
    from sepjax.loading import load
    from sepjax.run.checkpoint import step_folder

    step = int(step_folder(workdir, None).name)
    model, tokenizer = load(workdir, step=step)
    texts = list(prompts) or _beginnings(workdir, tokenizer, count)
    asked = [texts[i % len(texts)] for i in range(count)]
    settings = {"temperature": 0.8, "seed": 0, "max_new_tokens": max_new_tokens}
    with working(f"writing {count} samples"):
        read = _turns(workdir, tokenizer, asked) if apply_chat_template else asked
        answers = sepjax.generate(model, tokenizer, read, **settings)
    found = [
        {"prompt": p, "text": x.text, "finish_reason": x.finish_reason} for p, x in zip(asked, answers, strict=True)
    ]
    given = json.dumps([asked, settings, apply_chat_template])
    file = workdir / SAMPLES / f"step{step}_{hashlib.sha256(given.encode()).hexdigest()[:6]}.json"
    file.parent.mkdir(exist_ok=True)
    result = provenance() | {"step": step, "settings": settings, "samples": found}
    write_text(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return file


def _turns(workdir: Path, tokenizer: Tokenizer, asked: Sequence[str]) -> list[list[int]]:
    from sepjax.hub.chat_template import ChatTemplate

    template = ChatTemplate.of_model(workdir, tokenizer)
    if template is None:
        raise ConfigError(f"{workdir} has no chat template; leave out --apply_chat_template")
    return [template.encode(tokenizer, [{"role": "user", "content": text}]) for text in asked]


def _beginnings(workdir: Path, tokenizer: Tokenizer, count: int) -> list[str]:
    from sepjax.evaluation.inputs import texts_of
    from sepjax.run.checkpoint import load_config

    try:
        sources = texts_of(workdir, load_config(workdir), None, "", "", count)  # no conversations
    except ConfigError as error:
        if not isinstance(error.__cause__, NoFormError):
            raise
        raise ConfigError(
            f'{workdir} was trained on conversations: give --samples texts to answer, --prompt="..."'
        ) from error
    turns = itertools.zip_longest(*(source.documents for source in sources), fillvalue="")  # of a mixture each in turn
    ids = [tokenizer.encode(document)[:_BEGINNING] for document in itertools.chain(*turns)]
    return [tokenizer.decode(some) for some in ids if some]
