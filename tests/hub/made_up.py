"""Made-up tokenizer folders, chat templates and conversations, for comparison with transformers: all from a seed."""

import json

from sepjax.separators import BYTE_OF_CHARACTER

BYTES = list(BYTE_OF_CHARACTER)
NAMES = [
    "<s>",
    "</s>",
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<pad>",
    "<tool>",
    "[INST]",
]
KEYS = ["bos_token", "eos_token", "unk_token", "pad_token", "image_token"]
# Classes of transformers that take a tokenizer.json as it is, and those that build their own in its place: what the
# file says besides is lost there, so that it is made as they make it, with the tokens that they name.
AS_IT_IS = ["PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "OurTokenizer"]
BUILDS = ["GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast"]
NORMALIZER = {"GPTNeoXTokenizerFast": {"type": "NFC"}}
MODELS = {"GPT2": ["gpt2"], "GPTNeoX": ["gpt_neox"], "Llama": ["llama"]}  # with others transformers takes it as it is
OWN = {"GPT2": ["<|endoftext|>"], "GPTNeoX": ["<|endoftext|>", "<|padding|>"], "Llama": ["<s>", "</s>", "<unk>"]}
MERGES = [["t", "h"], ["th", "e"], ["i", "n"], ["a", "n"], ["Ġ", "the"], ["e", "r"], ["Ġ", "in"], ["1", "2"]]
WORDS = ["the", "then", "in", "an", "12", "1234", "Hello", "é", "日本", "😀", ".", ",", "\n", "\n\n", " ", "   ", "\t"]
WORDS += ["it's", "<b>", "</a>", "{}", '"', "\\", "'", "&", "\u00a0", "e\u0301", "<|im", "end|>", "\r\n", "None"]


def text(rng, most=8, names=0.25):
    pieces = [rng.choice(NAMES if rng.random() < names else WORDS) for _ in range(rng.randint(0, most))]
    return rng.choice(["", " "]).join(pieces)


def flags(rng, content, special=0.75):
    chances = {"single_word": 0.1, "lstrip": 0.15, "rstrip": 0.15, "normalized": 0.3, "special": special}
    return {"content": content} | {key: rng.random() < chance for key, chance in chances.items()}


def byte_level(rng):
    """Vocabulary, merges, pre-tokenizer and decoder of a byte-level tokenizer."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = MERGES[: rng.randint(0, len(MERGES))]
    return [*BYTES, *("".join(pair) for pair in merges)], merges, level, level


def pieces(rng):
    """The same of a SentencePiece-like one."""
    characters = ["▁", *map(chr, range(33, 127)), "é"]
    merges = [[a.replace("Ġ", "▁"), b] for a, b in MERGES[: rng.randint(0, len(MERGES))]]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    before = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    parts = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    parts += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return [*vocabulary, *("".join(x) for x in merges)], merges, before, {"type": "Sequence", "decoders": parts}


def post_processor(rng, ids, is_bytes):
    first = [rng.choice([*ids])] if ids and rng.random() < 0.5 else []
    last = [rng.choice([*ids])] if ids and rng.random() < 0.15 else []
    if not first and not last and rng.random() < 0.6:
        return None
    plain = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = [{"SpecialToken": {"id": x, "type_id": 0}} for x in first] + plain
    single += [{"SpecialToken": {"id": x, "type_id": 0}} for x in last]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {x: {"id": x, "ids": [ids[x]], "tokens": [x]} for x in first + last},
    }
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    several = {"type": "Sequence", "processors": [level, template] if is_bytes else [template]}
    return rng.choice([template, several])


def named(rng, content):
    if rng.random() < 0.65:
        return content
    token = flags(rng, content, 1.0)
    token = token if rng.random() < 0.5 else {k: v for k, v in token.items() if k != "special"}
    return token | ({"__type": "AddedToken"} if rng.random() < 0.95 else {})


def names_of(rng, known, chance=0.6):
    """ "bos_token" and the like, mostly of known tokens."""
    found = {}
    for key in KEYS:
        if rng.random() < (chance if key != "image_token" else 0.1):
            content = rng.choice([*known, *known, *known, *NAMES]) if known else rng.choice(NAMES)
            found[key] = None if rng.random() < 0.08 else named(rng, content)
    return found


def end_ids(rng, size):
    one = rng.choice([0, 2, size - 1, size - 2, 256])
    return rng.choice([one, [one], [one, 5], [], None, size + 9 if rng.random() < 0.1 else one])


def folder_of(rng, template):
    """The files of a made-up folder, by name."""
    is_bytes = rng.random() < 0.75
    llama, as_it_is = ["LlamaTokenizerFast", "LlamaTokenizer"], rng.random() < 0.6
    kind = rng.choice(AS_IT_IS if as_it_is else BUILDS if is_bytes else llama)
    must = [] if as_it_is else OWN[kind.partition("Tokenizer")[0]]
    vocabulary, merges, before, decoder = (byte_level if is_bytes else pieces)(rng)
    as_text = rng.sample(NAMES, rng.choice([0, 0, 0, 1, 2]))  # in the vocabulary, and no added tokens
    ids = {x: i for i, x in enumerate(dict.fromkeys([*vocabulary, *as_text]))}
    added = list(dict.fromkeys([*must, *rng.sample(NAMES, rng.randint(0, 6))]))
    later = rng.sample(NAMES, rng.choice([0, 0, 1, 2]))
    listed = []
    for content in added:
        ids.setdefault(content, len(ids))
        listed.append({"id": ids[content], **flags(rng, content)})
    listed.sort(key=lambda token: token["id"])
    own = {token["content"]: ids[token["content"]] for token in listed}
    model = {"type": "BPE", "vocab": {x: i for x, i in ids.items() if x not in own or x in vocabulary + as_text}}
    model |= {"merges": merges, "dropout": None, "fuse_unk": not is_bytes, "byte_fallback": not is_bytes}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": listed,
        "normalizer": rng.choice([None, None, {"type": "NFC"}]) if as_it_is else NORMALIZER.get(kind),
        "pre_tokenizer": before,
        "post_processor": None if kind in NORMALIZER else post_processor(rng, own, is_bytes),
        "decoder": decoder,
        "model": model | ({} if is_bytes else {"unk_token": "<unk>"}),
    }
    config, files = settings_of(rng, template, kind, [*own, *as_text]), {"tokenizer.json": tokenizer}
    if rng.random() < 0.3:
        for content in later:
            ids.setdefault(content, len(ids))
        where = {ids[x]: flags(rng, x) for x in later} | {token["id"]: dict(token) for token in listed}
        config["added_tokens_decoder"] = {str(i): {k: v for k, v in x.items() if k != "id"} for i, x in where.items()}
    elif rng.random() < 0.15:
        for content in later:
            ids.setdefault(content, len(ids))
        files["added_tokens.json"] = {x: ids[x] for x in later}
    if rng.random() < 0.35:
        files["special_tokens_map.json"] = names_of(rng, [*own, *later], 0.4)
        if rng.random() < 0.3:
            more = rng.sample(NAMES, 2)
            files["special_tokens_map.json"]["additional_special_tokens"] = [named(rng, x) for x in more]
    files["tokenizer_config.json"] = config
    model = rng.choice(["llama", "mistral", "gpt2", "gpt_neox"] if as_it_is else MODELS[kind.partition("Tokenizer")[0]])
    files["config.json"] = {"model_type": model, "eos_token_id": end_ids(rng, len(ids))}
    if rng.random() < 0.5:
        files["generation_config.json"] = {"eos_token_id": end_ids(rng, len(ids)), "temperature": 0.5}
    if rng.random() < 0.2:
        files["chat_template.jinja"] = files["tokenizer_config.json"].pop("chat_template")
    return files


def settings_of(rng, template, kind, known):
    """tokenizer_config.json, without the tokens by their ids."""
    config = {**names_of(rng, known), "tokenizer_class": kind}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if rng.random() < 0.15:
            config[key] = [named(rng, x) for x in rng.sample(known or NAMES, 1)]
    if rng.random() < 0.1:
        config["extra_special_tokens"] = {rng.choice(["audio_token", "picture"]): rng.choice(known or NAMES)}
    for key in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
        if rng.random() < 0.2:
            config[key] = rng.random() < 0.5
    if rng.random() < 0.04:
        config["split_special_tokens"] = True
    if rng.random() < 0.1:
        config["model_max_length"] = rng.choice([4, 2048])
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    config["chat_template"] = template if rng.random() < 0.9 else templates
    return config


EXPRESSIONS = [
    "message['content']", "message.content", "message['content'] | trim", "message.role", "message['role'] | upper",
    "bos_token", "eos_token", "pad_token", "image_token", "unk_token", "audio_token", "picture", "loop.index0",
    "loop.index", "loop.last", "loop.length", "message | tojson", "message | tojson(indent=2)",
    "messages | tojson(indent=4)", "message.content | tojson", "messages | length", "messages[0]['content']",
    "messages[-1].role", "messages[loop.index0 - 1].content", "message.content.strip()",
    "message.content.split('the')[-1]", "message.content | length", "message.content[:5]",
    "message.content | replace('the', 'x')", "message.get('name', 'nobody')", "message.name", "message.missing",
    "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'", "message.items() | list",
    "bos_token + message.content", "message.content ~ eos_token", "ns.count", "ns.last", "strftime_now('%Y-%m')",
    "tools", "documents", "message.content is string", "message.reasoning_content", "message.thinking",
    "message.reasoning", "message.content | default('-')", "message.tool_calls | tojson",
    "message.content.lstrip('\\n')", "'a' if loop.first else 'b'", "message.keys() | list | join(',')",
    "dict(a=1) | tojson", "range(3) | list", "message.content | string | title",
    "message | tojson(separators=(',', ':'), sort_keys=True)", "message.content | tojson(ensure_ascii=True)",
    "message | dictsort", "message.content.startswith('Hello')", "message | items | list", "message.content | e", "x",
    "say(message.content)", "messages | map(attribute='role') | join('/')",
    "messages | selectattr('role', 'equalto', 'user') | list | length",
    "messages | rejectattr('role', 'in', ['system']) | list | tojson", "dict.fromkeys(['a', 'b'], 1) | tojson",
    "message.content | int", "message.content | urlencode", "message.content | list | reverse | join",
    "messages[1:] | first", "'%s|%d' | format(message.role, 3)", "message.content | indent(2)",
    "message.content | wordcount", "{'a': none} | tojson", "message.content | e | safe", "cycler('a', 'b').next()",
    "joiner(', ')()", "message.tool_calls[0].function.name", "'\\u2028<>&\\'' | tojson", "1.0 | tojson",
    "(1 / 3) | round(2)", "[1, 2.5, true, none]", "loop.previtem.role", "loop.nextitem is defined",
    "loop.changed(message.role)", "loop.cycle('a', 'b')", "message.content.rsplit('\\n', 1) | last",
]  # fmt: skip
CONDITIONS = [
    "message.role == 'user'", "message['role'] == 'system'", "message.role in ['assistant', 'tool']", "loop.first",
    "loop.last", "not loop.last", "add_generation_prompt", "tools", "tools is not none",
    "documents is defined and documents", "bos_token", "tools is defined", "bos_token is defined",
    "eos_token is defined and eos_token", "message.content is defined", "message.content is string",
    "message.content is none", "'the' in message.content", "message.tool_calls is defined",
    "(message.role == 'user') != (loop.index0 % 2 == 0)", "ns.count > 1", "messages[0].role == 'system'",
    "message.name", "message is mapping", "message.content is iterable and message.content is not string",
    "enable_thinking is defined", "message.reasoning_content is defined", "builtin_tools is defined",
    "message.content is not undefined",
]  # fmt: skip


def block(rng, depth):
    """A piece of a template: text, or any of what real ones are made of."""
    a, b = rng.choice(["{%", "{%-"]), rng.choice(["%}", "-%}"])
    kind = rng.choice(
        ["text", "write", "write", "write", "write", "if", "if", "set", "ns", "break", "stop", "generation", "more"]
    )
    if depth > 2 and kind in ("if", "generation", "more"):
        kind = "write"
    inside = "" if depth > 2 else blocks(rng, depth + 1)
    if kind == "text":
        return rng.choice(
            ["\n", " ", "  \n  ", "### ", "[INST] ", "<|im_start|>", "<|im_end|>\n", "text\n", "{# note #}\n", "\t"]
        )
    if kind == "write":
        return rng.choice(["{{ %s }}", "{{- %s }}", "{{ %s -}}", "{{- %s -}}"]) % rng.choice(EXPRESSIONS)
    if kind == "if":
        other = rng.choice(["", f"{a} else {b}{block(rng, depth + 1)}"])
        other = rng.choice(["", f"{a} elif {rng.choice(CONDITIONS)} {b}{block(rng, depth + 1)}"]) + other
        return f"{a} if {rng.choice(CONDITIONS)} {b}{inside}{other}{a} endif {b}"
    if kind == "set":
        return rng.choice(
            [
                f"{a} set x = {rng.choice(EXPRESSIONS)} {b}",
                f"{a} set x {b}{inside}{a} endset {b}",
                f"{a} set x = '' {b}",
            ]
        )
    if kind == "ns":
        return f"{a} set ns.{rng.choice(['count = ns.count + 1', 'last = message.role', 'last = loop.index0'])} {b}"
    if kind == "break":
        return f"{a} if {rng.choice(CONDITIONS)} {b}{a} {rng.choice(['break', 'continue'])} {b}{a} endif {b}"
    if kind == "stop":
        stop = "{{ raise_exception('no ' + message.role) }}"
        return f"{a} if {rng.choice(CONDITIONS)} and {rng.choice(CONDITIONS)} {b}{stop}{a} endif {b}"
    if kind == "generation":
        return f"{a} generation {b}{inside}{a} endgeneration {b}"
    return rng.choice(
        [
            f"{a} for key, value in message.items() {b}{{{{ key }}}}={{{{ value }}}}{a} endfor {b}",
            f"{a} for tool in tools or [] {b}{{{{ tool | tojson }}}}{a} else {b}no tools{a} endfor {b}",
            f"{a} for m in messages if m.role == 'user' {b}{{{{ m.content }}}}{{{{ loop.index }}}}{a} endfor {b}",
            f"{a} filter trim {b}{inside}{a} endfilter {b}",
            f"{a} call wrap() {b}{inside}{a} endcall {b}",
            f"{a} with x = message.role {b}{inside}{a} endwith {b}",
        ]
    )


def blocks(rng, depth):
    return "".join(block(rng, depth) for _ in range(rng.randint(1, 4)))


def template_of(rng):
    """A chat template: definitions, what comes first, a loop over messages, what comes last."""
    space = rng.choice(["", "\n", "\n    "])
    start = ["{% macro say(text, n=2) %}({{ text }}|{{ n }}){% endmacro %}"]
    start += ["{%- macro wrap() -%}<{{ caller() }}>{%- endmacro -%}", "{% set ns = namespace(count=0, last='') %}"]
    start += rng.choice([[], ["{{ bos_token }}"], ["{{- bos_token -}}"], ["{% set message = messages[0] %}"]])
    if rng.random() < 0.05:
        start.append(
            rng.choice(["{% set ns._x = 1 %}{{ ns._x }}", "{% set n2 = namespace(_a=1) %}", "{{ dict(_a=1) }}"])
        )
    over = rng.choice(["messages", "messages", "messages[1:]", "messages | reverse", "messages if message.content"])
    loop = f"{{% for message in {over} %}}{space}{blocks(rng, 0)}{space}{{% endfor %}}"
    last = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}" if rng.random() < 0.7 else ""
    return space.join([*start, loop, last]) + rng.choice(["", "\n"])


def messages_of(rng):
    """A conversation, with keys that few have."""
    found = []
    for _ in range(rng.randint(1, 4)):
        message = {
            "role": rng.choice(["system", "user", "user", "assistant", "assistant", "tool"]),
            "content": text(rng),
        }
        for key, chance in {"name": 0.1, "reasoning_content": 0.1, "thinking": 0.07, "reasoning": 0.07}.items():
            if rng.random() < chance:
                message[key] = rng.choice([text(rng, 3), None])
        if rng.random() < 0.1:
            call = {"name": "find", "arguments": {"b": [1, 2.5, None, True], "a": text(rng, 3)}}
            message["tool_calls"] = [{"type": "function", "function": call}]
        if rng.random() < 0.05:
            message["content"] = rng.choice([None, [{"type": "text", "text": text(rng, 3)}]])
        found.append(message)
    return found


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
