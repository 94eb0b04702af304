"""What transformers makes of a folder's tokenizer and chat template. Needs transformers, and none of sepjax.

python tests/hub/tokenizer_reference.py   a request in JSON each line of stdin, its answer after "answer " on stdout:
    {"folder": ..., "texts": [...], "conversations": [[messages, add_generation_prompt], ...]}
    -> {"refused": why} | {"bos": id, "eos": id, "ends": [...], "ids": [...], "plain": [...], "chats": [...]}
where a chat is {"text": ..., "ids": ...} or {"refused": why}.
"""

import contextlib
import json
import sys

import transformers


def as_set(ids):
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}


def ends(folder, tokenizer):
    """All that ends an answer: of generation_config.json, config.json and the tokenizer."""
    config = transformers.AutoConfig.from_pretrained(folder)
    found = as_set(tokenizer.eos_token_id) | as_set(config.eos_token_id)
    with contextlib.suppress(OSError):  # where there is no such file
        found |= as_set(transformers.GenerationConfig.from_pretrained(folder).eos_token_id)
    return sorted(found)


def chat(tokenizer, messages, prompt):
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
        return {"text": text, "ids": encoded["input_ids"]}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def answer(request):
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
        return {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "ends": ends(request["folder"], tokenizer),
            "ids": [tokenizer(text)["input_ids"] for text in request["texts"]],
            "plain": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
            "chats": [chat(tokenizer, *conversation) for conversation in request["conversations"]],
        }
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for line in sys.stdin:
        print("answer " + json.dumps(answer(json.loads(line))), flush=True)
