"""A table of the ids that are worth keeping, measured on a model and its texts, as a file or in the model's folder."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepjax.config import AttentionConfig, ConfigError, UserError
from sepjax.data.tokenizer import Tokenizer
from sepjax.evaluation.perplexity import token_windows
from sepjax.hub.families import KEY
from sepjax.keeping import MEASURES
from sepjax.keeping.measure import best_ids, per_use, worth
from sepjax.model.transformer import Transformer


class TableError(UserError, ValueError):
    """A table that cannot be measured or stored as asked."""


@dataclasses.dataclass(frozen=True)
class KeptTable:
    """Ids to keep, and how they were found. Its JSON is read wherever ids are: `--arms="separator ids=@FILE"`."""

    separator_ids: tuple[int, ...]
    by: str
    density: float  # asked for
    kept: float  # of the tokens that were read, the share that these ids are
    window_size: int
    tokens: int  # read
    measured: int  # of them run through the model
    most: tuple[tuple[str, int], ...]  # the most frequent kept ids' texts, and their counts


def measure_table(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    by: str,
    density: float,
    window_size: int = 256,
    length: int = 1024,
    max_tokens: int = 65_536,
) -> KeptTable:
    """Finds the ids of the largest worth a use that together make up `density` of the texts.

    Args:
      model: from `sepjax.load`.
      tokenizer: the model's.
      texts: UTF-8 texts like those that the model will read. All are counted.
      by: one of `MEASURES` (`sepjax.keeping.measure`).
      density: kept tokens a token, 0 to 1.
      window_size: n; what is nearer is seen in any case.
      length: T, tokens of a row that is measured; more than n.
      max_tokens: measured at most, spread evenly over the texts.

    Raises:
      TableError: an unknown measure, a density outside 0 to 1, a length that has nothing far, or no text.
    """
    if by not in MEASURES:
        raise TableError(f"--by={by!r} is not one of {', '.join(MEASURES)}")
    if not 0 < density < 1:
        raise TableError(f"--density={density} must be above 0 and below 1: kept tokens a token")
    if by != "rarity" and length <= window_size:
        raise TableError(f"--length={length} has nothing farther than --window_size={window_size}; raise it")
    windows = token_windows(tokenizer, texts, length).ids
    counts = np.bincount(np.concatenate(windows), minlength=model.config.vocab_size)
    value, measured = -counts.astype(float), 0
    if by != "rarity":
        rows = rows_with_a_past(windows, window_size, length, max_tokens)
        value = per_use(*worth(model, rows, by, window_size=window_size))
        measured = sum(map(len, rows))
    names = tokenizer.token_texts()
    candidates = np.zeros(len(counts), bool)
    candidates[: len(names)] = [name is not None for name in names]
    candidates &= (value > 0) | (by == "rarity")
    ids = best_ids(value, counts, density, candidates)
    if not counts[ids].sum():
        raise TableError(f"--density={density} is less than any id makes up in these texts; raise it or give more text")
    most = ids[np.argsort(-counts[ids], kind="stable")][:20].tolist()
    return KeptTable(
        separator_ids=tuple(ids.tolist()),
        by=by,
        density=density,
        kept=float(counts[ids].sum() / counts.sum()),
        window_size=window_size,
        tokens=int(counts.sum()),
        measured=measured,
        most=tuple((str(names[i]), int(counts[i])) for i in most),
    )


def rows_with_a_past(
    windows: Sequence[np.ndarray], window_size: int, length: int, max_tokens: int
) -> Sequence[np.ndarray]:
    """Of windows of text of up to `length` + 1 tokens those that reach beyond n, at most `max_tokens`, spread evenly.

    Raises TableError where there is none.
    """
    full = [ids for ids in windows if len(ids) > window_size + 1]
    if not full:
        raise TableError(
            f"no text has more than {window_size} tokens, which are seen anyway: nothing is far in them; give longer "
            "texts, or lower --window_size (of sepjax layers: --slots)"
        )
    return full[:: -(-len(full) * (length + 1) // max_tokens)]


def store(table: KeptTable, folder: Path, attention: AttentionConfig) -> Path:
    """Makes the table the separators of the model in a Hugging Face folder; returns the file that was changed.

    Args:
      table: from `measure_table`.
      folder: has the config.json, whose key "sepllm" gets the settings.
      attention: the model's settings, of which only the separators change.

    Raises:
      TableError: the folder is a run's or has no config.json.
    """
    path = folder / "config.json"
    if (folder / "checkpoints").exists() or not path.is_file():
        raise TableError(
            f"cannot store a table in {str(folder)!r}, which is not a Hugging Face folder: convert the model first "
            "(sepjax convert), or begin a run with --config.attention.separators=TABLE.json"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not JSON: {error}") from error
    changes = {"pattern": "separator", "separators": "ids", "separator_ids": table.separator_ids}
    values[KEY] = dataclasses.asdict(dataclasses.replace(attention, **changes))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
