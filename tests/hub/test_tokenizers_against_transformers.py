"""Made-up tokenizer files and chat templates against transformers: equal texts and ids, or refused by name.

SEPJAX_TORCH_PYTHON=... SEPJAX_FUZZ_SECONDS=600 python -m pytest -m soak -s -k every_tokenizer tests/hub
"""

import collections
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sepjax.config import UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.hub.chat_template import ChatTemplate
from tests.hub import made_up

TORCH = sys.executable if importlib.util.find_spec("torch") else os.environ.get("SEPJAX_TORCH_PYTHON")


class Reference:
    """transformers in a process of its own."""

    def __init__(self):
        script = Path(__file__).with_name("tokenizer_reference.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([str(TORCH), str(script)], env=offline, **pipes)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line[7:])
        raise RuntimeError("the process of transformers ended")


def loaded(folder):
    """Our tokenizer, or the message."""
    try:
        return Tokenizer.load(folder)
    except UserError as error:
        return str(error)


def differences(tokenizer, theirs, texts):
    """What is not equal of ids without a template."""
    name = tokenizer.special.names.get("bos_token")
    ids = {
        "bos": None if name is None else tokenizer._model.vocabulary.token_to_id(name),
        "eos": tokenizer.eos_id,
        "ends": list(tokenizer.end_ids),
    }
    found = [(key, ours, theirs[key]) for key, ours in ids.items() if ours != theirs[key]]
    for text, plain, whole in zip(texts, theirs["plain"], theirs["ids"], strict=True):
        ours, start = tokenizer.encode(text), tokenizer.prefix
        if ours != plain:
            found.append(("ids", (text, ours), plain))
        elif tokenizer.with_bos(ours) not in (whole[: len(plain) + len(start)], whole[len(start) :][: len(plain)]):
            found.append(("ids after BOS", (text, tokenizer.with_bos(ours)), whole))
    return found


def chat_differences(tokenizer, messages, prompt, theirs, tally):
    """What is not equal of a rendered conversation."""
    try:
        template = ChatTemplate.of(tokenizer)
        assert template is not None
        text = template.render(messages, add_generation_prompt=prompt)
    except UserError as error:
        tally["chat: refused" + (" by both" if "refused" in theirs else "")] += 1
        return [] if "refused" in theirs else [("refused by us alone", str(error), theirs["text"])]
    if "refused" in theirs:
        return [("refused by transformers alone", text, theirs["refused"])]
    tally["chat: equal"] += 1
    if text != theirs["text"]:
        return [("text", text, theirs["text"])]
    ids = tokenizer.encode(text)
    return [] if ids == theirs["ids"] else [("ids of a conversation", text, ids, theirs["ids"])]


@pytest.mark.soak
@pytest.mark.skipif(TORCH is None, reason="needs transformers here, or SEPJAX_TORCH_PYTHON")
def test_every_tokenizer_and_template_is_read_as_transformers_does_or_refused(tmp_path):
    reference, tally, refused, faults = Reference(), collections.Counter(), collections.Counter(), []
    end = time.monotonic() + float(os.environ.get("SEPJAX_FUZZ_SECONDS", "600"))
    first, folder = int(os.environ.get("SEPJAX_FUZZ_SEED", "0")), tmp_path / "m"
    for seed in itertools.count(first):
        rng = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        made_up.write(folder, files := made_up.folder_of(rng, made_up.template_of(rng)))
        texts = [made_up.text(rng) for _ in range(4)]
        chats = [[made_up.messages_of(rng), rng.random() < 0.5] for _ in range(3)]
        theirs = reference.ask(folder=str(folder), texts=texts, conversations=chats)
        tokenizer = loaded(folder)
        if isinstance(tokenizer, str):
            assert str(folder) in tokenizer, (seed, tokenizer)  # it names the file
            tally["folder: refused" + (" by both" if "refused" in theirs else "")] += 1
            refused[re.sub(r"'[^']*'|[\d.]+", "_", tokenizer.partition("': ")[2])[:100]] += 1
            continue
        if "refused" in theirs:
            tally[f"folder: read, and refused by transformers ({theirs['refused'][:90]})"] += 1
            continue
        found = differences(tokenizer, theirs, texts)
        for (messages, prompt), theirs_of in zip(chats, theirs["chats"], strict=True):
            found += chat_differences(tokenizer, messages, prompt, theirs_of, tally)
        tally["folder: different" if found else "folder: equal"] += 1
        if found:
            faults.append((seed, found, files))
        if time.monotonic() > end or len(faults) > int(os.environ.get("SEPJAX_FUZZ_FAULTS", "20")):
            break
    reference.process.communicate()
    print(f"\nseeds {first} to {seed}")
    print("\n".join(f"{count:6} {name}" for name, count in sorted(tally.items())))
    print("\n".join(f"{count:6} refused: {reason}" for reason, count in refused.most_common(100)))
    print("\n".join(map(str, faults)))
    assert not faults
    assert all(tally[f"{kind}: {what}"] for kind in ("folder", "chat") for what in ("equal", "refused by both"))
