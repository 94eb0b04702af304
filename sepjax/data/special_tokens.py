"""What the files beside a vocabulary say of its tokens: names, tokens added later, end tokens, the chat template.

A tokenizer.json itself does not say which tokens are BOS and EOS, nor which others end an answer. Hugging Face folders
spread that over half a dozen files; `SpecialTokens.read` joins them, `files` writes what a saved tokenizer keeps.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sepjax.config import nearest

CONFIG, MAP, ADDED, GENERATION = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip
TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
BESIDE = (CONFIG, MAP, ADDED, GENERATION, "config.json", TEMPLATE, TEMPLATE_JSON)
ORDER = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)  # transformers' own
_MORE = ("extra_special_tokens", "additional_special_tokens")  # the newer key and the older one
OLDER = "of added_tokens.json"  # marks a token whose flags count only where a tokenizer.json has none for it
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json
POINTER = b"version https://git-lfs"  # how a file begins that Git has left in the place of a large one
_MOST = 2**28  # bytes of a tokenizer's file; the largest known ones have 40 million
# Names that a class of transformers gives where no file does: BOS, EOS, unknown, padding.
_CLASS_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_BY_CLASS = {
    "GPT2Tokenizer": ("<|endoftext|>",) * 3,
    "GPTNeoXTokenizer": (*("<|endoftext|>",) * 3, "<|padding|>"),
    "LlamaTokenizer": ("<s>", "</s>", "<unk>"),
    "CodeLlamaTokenizer": ("<s>", "</s>", "<unk>"),
}
# Families whose config and generation_config have this end token in every file, whatever the vocabulary.
_END_BY_DEFAULT = {"gpt2": 50256}


class SpecialTokenError(ValueError):
    """Files beside a vocabulary that do not fit it, or are damaged: names the file and the key."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """What is known besides the vocabulary itself. Plain values; nothing is checked against a vocabulary yet."""

    names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # "bos_token": "<s>"; None: there is none
    flags: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # of tokens named with flags
    more: tuple[str, ...] = ()  # further control tokens, which no name stands for
    has_class: bool = False  # a class is named: where neither BOS nor EOS is, they are those of the class, or none
    by_class: Mapping[str, str] = dataclasses.field(default_factory=dict)  # names that count if the vocabulary has them
    added: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # tokens by id: content, flags
    end_ids: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # ends of an answer, by their file
    default_end: int | None = None  # the family's end token, which its files name for any vocabulary
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the keys `SAMPLING`, as they are
    chat_template: Any = None  # as it is in the file: a text, or several under names
    adds_bos: bool | None = None  # for SentencePiece models; a tokenizer.json says it itself

    @classmethod
    def read(cls, beside: Mapping[str, bytes]) -> "SpecialTokens":
        """Joins the contents of the files `BESIDE` that there are.

        Raises:
          SpecialTokenError: one of them is damaged, or has a value of the wrong kind.
        """
        values = {name: _parse(name, content) for name, content in beside.items() if name.endswith(".json")}
        config, (more, own) = values.get(CONFIG, {}), _more(values)
        named = _named(values) | own
        kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        if config.get("split_special_tokens"):
            raise SpecialTokenError(
                f"{CONFIG} has split_special_tokens={str(config['split_special_tokens'])[:9]}: control tokens in texts "
                "would be text; expected false: remove it; control_tokens=False (--nocontrol_tokens) does that here"
            )
        template = config.get("chat_template")
        template = values.get(TEMPLATE_JSON, {}).get("chat_template", template)
        if TEMPLATE in beside:
            template = _text(TEMPLATE, beside[TEMPLATE])
        ends = {name: _end_ids(name, values[name]) for name in ("config.json", GENERATION) if name in values}
        return cls(
            names={key: _content(key, token) for key, token in named.items()},
            flags=_flags(named, more),
            more=tuple(name for token in more if (name := _content(_MORE[0], token))),
            has_class=bool(kind),
            by_class=dict(zip(_CLASS_NAMES, _BY_CLASS.get(kind, ()), strict=False)),
            added=_added(values, named),
            end_ids={name: ids for name, ids in ends.items() if ids},
            default_end=_END_BY_DEFAULT.get(str(values.get("config.json", {}).get("model_type"))),
            sampling={key: value for key, value in values.get(GENERATION, {}).items() if key in SAMPLING},
            chat_template=template,
            adds_bos=config.get("add_bos_token") if isinstance(config.get("add_bos_token"), bool) else None,
        )

    def files(self) -> dict[str, bytes]:
        """What `read` gives back, in the files that transformers reads."""
        config: dict[str, Any] = {key: name for key, name in self.names.items() if key.endswith("_token")}
        own = {key: name for key, name in self.names.items() if key not in config}
        config |= {"extra_special_tokens": own} if own else {}
        config |= {"additional_special_tokens": list(self.more)} if self.more else {}
        config |= {} if self.chat_template is None else {"chat_template": self.chat_template}
        config |= {} if self.adds_bos is None else {"add_bos_token": self.adds_bos}
        generation = dict(self.sampling)
        ends = sorted({i for ids in self.end_ids.values() for i in ids})
        generation |= {"eos_token_id": ends} if ends else {}
        found = {CONFIG: config, GENERATION: generation}
        return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in found.items() if value}

    def without(self, contents: Collection[str]) -> "SpecialTokens":
        """The same with these tokens named nowhere."""
        return dataclasses.replace(
            self,
            names={key: name for key, name in self.names.items() if name not in contents},
            flags={name: said for name, said in self.flags.items() if name not in contents},
            more=tuple(name for name in self.more if name not in contents),
            by_class={key: name for key, name in self.by_class.items() if name not in contents},
            added={i: token for i, token in self.added.items() if token["content"] not in contents},
        )

    def check_ends(self, vocab_size: int) -> tuple[int, ...]:
        """All end tokens of the files, in order; SpecialTokenError for one that the vocabulary does not have."""
        for name, ids in self.end_ids.items():
            outside = [i for i in ids if not 0 <= i < vocab_size and i != self.default_end]
            if outside:
                raise SpecialTokenError(
                    f"{name} has the end token eos_token_id={outside[0]}, which the vocabulary of {vocab_size} tokens "
                    f"lacks: no answer would end; correct {name}"
                )
        return tuple(sorted({i for ids in self.end_ids.values() for i in ids if i < vocab_size}))

    def check_name(self, key: str, has: Mapping[str, int]) -> str | None:
        """The token that `key` names, or that its class gives; None where there is none.

        Raises:
          SpecialTokenError: the vocabulary lacks the token.
        """
        name = self.names.get(key)
        if name is None:
            default = None if key in self.names else self.by_class.get(key)
            return default if default in has else None
        if name not in has:
            near = nearest(name, list(has)[-4096:])  # of the last ones: names of special tokens are there
            raise SpecialTokenError(
                f"{key} is {name!r}, which the vocabulary of {len(has)} tokens lacks{near}; correct it in {CONFIG} or "
                f"{MAP}"
            )
        return name


def read_beside(folder: Any) -> dict[str, bytes]:
    """The contents of those of the files `BESIDE` that a folder has."""
    return {name: read_regular(folder / name) for name in BESIDE if (folder / name).exists()}


def read_regular(path: Any, most: int = _MOST) -> bytes:
    """A file's content.

    Raises:
      SpecialTokenError: it is not a regular file (a pipe or a device may have no end), larger than `most` bytes, or a
        pointer of Git LFS.
      FileNotFoundError: it is not there.
    """
    try:
        about = os.stat(path)
    except FileNotFoundError:
        if "://" not in os.fspath(path):
            raise
    else:
        if not stat.S_ISREG(about.st_mode):
            raise SpecialTokenError(f"{Path(path).name} is a pipe, a device or a folder, expected a file")
        if about.st_size > most:
            raise SpecialTokenError(f"{Path(path).name} has {about.st_size:,} bytes, more than {most:,}")
    content = path.read_bytes()
    if content.startswith(POINTER):
        raise SpecialTokenError(f"{Path(path).name} is a pointer of Git LFS, not the file: git lfs pull fetches that")
    return content


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_text(name, content))
    except (ValueError, RecursionError) as error:
        raise SpecialTokenError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecialTokenError(f"{name} holds a {type(value).__name__}, expected a JSON object")
    return value


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecialTokenError(f"{name} is not UTF-8 text: {error}") from error


def _named(values: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """All "..._token" of both files. As in transformers the map wins, and is not read where the config lists tokens."""
    config, theirs = ({k: v for k, v in values.get(n, {}).items() if k.endswith("_token")} for n in (CONFIG, MAP))
    # A name of a model's own: the config's counts if it is a text, and there no object without a type.
    own = {k: v for k, v in config.items() if k not in ORDER and isinstance(v, str)}
    config = {k: v for k, v in config.items() if k in ORDER or not isinstance(v, dict) or "__type" in v}
    named = config if _lists(values) else config | theirs | {k: v for k, v in own.items() if k in config}
    return {key: token for key, token in named.items() if not isinstance(token, bool)}  # add_bos_token names nothing


def _lists(values: Mapping[str, dict[str, Any]]) -> bool:
    """Whether tokenizer_config.json lists its tokens itself."""
    return "added_tokens_decoder" in values.get(CONFIG, {})


def _content(key: str, token: Any) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) and token is not None:
        raise SpecialTokenError(f"{key} is {str(token)[:80]}, expected a token's text")
    return name


def _more(values: Mapping[str, dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """Further control tokens: a list, and tokens with names of a model's own.

    As in transformers: the newer key counts before the older one, and the config's list before that of the map.
    """
    config, theirs = values.get(CONFIG, {}), {} if _lists(values) else values.get(MAP, {})
    found = [config[key] for key in _MORE if key in config]
    tokens = next((x for x in found if x), found[0] if found else None)
    named = dict(_checked("model_specific_special_tokens", config.get("model_specific_special_tokens") or {}, dict))
    if isinstance(tokens, dict):
        named, tokens = named | tokens, None
    newer = theirs.get(_MORE[0]) or []
    if isinstance(newer, dict):
        named |= newer
    elif newer:
        tokens = [*(tokens or []), *_checked(_MORE[0], newer, list)]
    tokens = theirs.get(_MORE[1], config.get(_MORE[1])) if tokens is None else tokens
    return [token for token in _checked(_MORE[1], tokens or [], list) if token is not None], named


def _checked(key: str, tokens: Any, kind: type) -> Any:
    if not isinstance(tokens, kind):
        raise SpecialTokenError(f"{key} is {str(tokens)[:80]}, expected a {kind.__name__} of tokens")
    return tokens


def _flags(named: Mapping[str, Any], more: list[Any]) -> dict[str, Mapping[str, Any]]:
    """What is said of named tokens, by their text. Of several of one text the last new one counts."""
    found: dict[str, Mapping[str, Any]] = {}
    seen: list[Any] = []
    for token in [*(named.get(key) for key in ORDER), *named.values(), *more]:
        said, text = (token, token.get("content")) if isinstance(token, dict) else ({}, token)
        if isinstance(text, str) and token not in seen:
            seen.append(token)
            found[text] = said
    return {text: said for text, said in found.items() if said}


def _added(values: Mapping[str, dict[str, Any]], named: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Tokens that a tokenizer.json may lack: `added_tokens_decoder`, or the older added_tokens.json."""
    listed = values.get(CONFIG, {}).get("added_tokens_decoder")
    if listed is None:
        special = {_content(key, token) for key, token in named.items()}
        listed = {
            i: {"content": text, "special": text in special, OLDER: True} for text, i in values.get(ADDED, {}).items()
        }
    if not isinstance(listed, dict):
        raise SpecialTokenError(f"added_tokens_decoder is a {type(listed).__name__}, expected ids with tokens")
    added = {}
    for i, token in listed.items():
        if not str(i).isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise SpecialTokenError(f"added token {str(i)[:20]}: {str(token)[:80]}, expected an id with a token's text")
        added[int(i)] = token
    return dict(sorted(added.items()))


def _end_ids(name: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    found = values.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int for i in ids):
        raise SpecialTokenError(f"{name} has eos_token_id={str(found)[:80]}, expected a token id or a list of them")
    return tuple(ids)
