"""finds which layers should keep distant tokens, and how many, and checks the result against a window

    sepjax layers --model=models/qwen --text=books/ --slots=800        stored with the model
    sepjax chat --model=models/qwen                                    uses the result

Layers that gain by it keep watched tokens; the others have a plain window (docs/keeping.md). Half of the texts are for
the search. On the other half the result must beat a plain window of the same bytes; otherwise the window is written.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings

# Of a row ten times the slots: as in a stream, what is beyond the window is more than the kept zone holds. On a CPU
# that would take hours.
_TOKENS, _ON_CPU = (0, 32_768, 32_768), (1024, 6144, 16_384)  # of a row, to choose by, to check on
_ROW = 10
_LEAST = 4  # times the slots: of shorter rows most would be in the window, so there all sizes are smaller
_SHORTEST = 256  # tokens of a row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sepjax.config import AttentionConfig, ModelConfig
    from sepjax.keeping.held_out import Check
    from sepjax.keeping.search import Step
    from sepjax.keeping.trial import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which model, on which text."""

    model: str  # what sepjax.load reads: a workdir, a folder, a GGUF file
    text: str  # a .txt file or a folder of them, similar to the texts of later use
    check_text: str = ""  # other texts, to check the result on; default: half of --text
    slots: Annotated[int, AtLeast(64)] = 800  # entries per layer of the plain window whose bytes are the budget
    # layers that keep tokens; 0: as many as gain by it, up to half of all, a quarter if rows are short (--length)
    layers: Annotated[int, AtLeast(0)] = 0
    # tokens per row of the search; 0: ten times --slots, on a CPU 1,024. Below four times --slots layers are tried
    # one at a time, and sizes are not searched
    length: Annotated[int, AtLeast(0)] = 0
    max_tokens: Annotated[int, AtLeast(0)] = 0  # maximum tokens of the search; 0: 32,768, on a CPU 6,144
    check_tokens: Annotated[int, AtLeast(0)] = 0  # tokens of the check, on other texts; 0: 32,768, on a CPU 16,384
    seed: Annotated[int, AtLeast(0)] = 0  # seed of the split of --text into search and check
    # file to write, for --arm=@FILE; default: kept.arm, stored with the model, which its bounded caches use from then
    # on; or layers.arm if the model is not a local file or folder, or was trained under its own mask
    output: str = ""


def main(settings: Settings) -> None:
    """Writes the settings and says what they are worth."""
    import jax

    from sepjax.config import ConfigError
    from sepjax.evaluation.documents import read_texts
    from sepjax.files import check_file, write_text
    from sepjax.keeping.held_out import check, divide
    from sepjax.keeping.layers import as_arm, plain_window, split_memory
    from sepjax.keeping.trial import Prepared, Row
    from sepjax.loading import load
    from sepjax.progress import counted

    if settings.output:
        check_file(settings.output)
    given = read_texts(Path(settings.text))
    others = read_texts(Path(settings.check_text)) if settings.check_text else []
    model, tokenizer = load(settings.model)
    output, stored = _output(settings, model.attention)
    config, base, slots = model.config, model.attention, settings.slots
    row, most_chosen_by, most_checked = _ON_CPU if jax.default_backend() == "cpu" else _TOKENS
    length = settings.length or min(row or _ROW * slots, config.max_positions)
    if config.max_positions < _SHORTEST:
        raise ConfigError(
            f"the model has {config.max_positions} positions, too few to tell who uses the distant past: at least "
            f"{_SHORTEST} are needed"
        )
    if not _SHORTEST <= length <= config.max_positions:
        raise ConfigError(
            f"--length={length} must be {_SHORTEST} or more, and at most the model's {config.max_positions} positions"
        )
    scale = min(1.0, length / (_LEAST * slots))
    trial = split_memory(config, range(settings.layers or max(1, config.num_layers // 4)), slots, base)
    texts = divide(
        tokenizer, given, others, length=length,
        max_tokens=settings.max_tokens or most_chosen_by, check_length=5 * slots,
        check_tokens=settings.check_tokens or most_checked, least=2 * slots, seed=settings.seed,
    )  # fmt: skip
    prepared = Prepared.create(model, max(map(len, texts.rows)) - 1, trial)
    rows = [Row.create(prepared, ids) for ids in counted(texts.rows, "reading", len(texts.rows), "rows")]
    chosen, window = _choose(settings, rows, config, trial, scale), plain_window(slots, base, config.num_layers)
    if chosen is None:
        print("no layer gains more than its error by keeping tokens, so a plain window is written")
        write_text(output, as_arm(window) + "\n")
        print(_written(settings, output, stored))
        return
    del rows, prepared
    checked = check(model, tokenizer, texts.documents, chosen, window, slots)
    _tell_check(checked)
    print(f"chosen: {as_arm(chosen)}")
    if not checked.wins:
        print(
            f"that does not beat a window of as many bytes by more than the error, so this is written: {as_arm(window)}"
        )
    write_text(output, as_arm(chosen if checked.wins else window) + "\n")
    print(_written(settings, output, stored))


def _output(settings: Settings, own: "AttentionConfig") -> tuple[Path, Path]:
    """Where the settings go, and where those lie that are stored with the model; raises before hours of search."""
    import os

    from sepjax import kept
    from sepjax.files import check_file
    from sepjax.loading import locate

    source = locate(settings.model)
    stored = kept.place(source)
    is_here = Path(settings.model).exists() and os.access(stored.parent, os.W_OK)
    takes_it = is_here and not kept.has_own_mask(source, own)
    output = Path(settings.output) if settings.output else (stored if takes_it else Path("layers.arm"))
    check_file(output)
    return output, stored


def _written(settings: Settings, output: Path, stored: Path) -> str:
    """The last line: where the settings are, and who takes them."""
    if output.resolve() == stored.resolve():
        taken = "remove it, or give them --arm or --pattern, for another"
        return f"stored in {output}: sepjax chat, serve and generate --stream keep that from now on ({taken})"
    by_hand = f"--arm=@{output} of sepjax generate, chat and serve"
    if Path(settings.model).exists():
        by_hand += f"; copied to {stored}, they take it without being told"
    return f"written to {output}: {by_hand}"


def _choose(
    settings: Settings, rows: "Sequence[Row]", config: "ModelConfig", trial: "AttentionConfig", scale: float
) -> "AttentionConfig | None":
    """What is to be checked; None: no layer gains by keeping. Says what was tried."""
    from sepjax.keeping.layers import plain_window
    from sepjax.keeping.search import (
        OF_LAYERS,
        choose_layers,
        choose_sizes,
        cost,
        geometry_of,
        rank_layers,
        usual_sizes,
    )

    L, number, slots = config.num_layers, settings.layers, settings.slots
    geometry, fixed = geometry_of(trial, scale), number > 0
    if scale < 1:
        steps = rank_layers(rows, geometry, L, number or max(1, round(L * OF_LAYERS)), fixed=fixed)
    else:
        steps = choose_layers(rows, geometry, L, number or max(1, L // 2), fixed=fixed)
    _tell_layers(steps, rows, "each alone" if scale < 1 else "one beside the other")
    if not steps:
        return None
    layers = [x.layer for x in steps]
    if scale < 1:
        chosen = usual_sizes(layers, config, slots, trial)
        print(f"rows of fewer than {_LEAST * slots:,} tokens tell little of sizes, so these are the usual ones:")
        _tell_sizes([chosen])
        return chosen
    tried = choose_sizes(rows, layers, config, slots, trial, number)
    plain = cost(rows, plain_window(slots, trial, L), L)
    _tell_sizes([x.attention for x in tried], [(x.divergence, x.loss) for x in tried], plain)
    return tried[0].attention


def _tell_layers(steps: "Sequence[Step]", rows: "Sequence[Row]", how: str) -> None:
    tokens = sum(row.size for row in rows)
    print(f"{tokens:,} tokens in {len(rows)} rows; nearer to the dense model by keeping tokens, {how},")
    print("in 1/1000 nats a token:")
    for step in steps:
        error = "" if step.error is None else f"  +- {1000 * step.error:.2f}"
        print(f"layer {step.layer:>3}  {1000 * step.gain:>7.2f}{error}")


def _tell_sizes(
    splits: "Sequence[AttentionConfig]",
    costs: "Sequence[tuple[float, float]]" = (),
    plain: tuple[float, float] | None = None,
) -> None:
    told = [f"{1000 * divergence:>26.2f}{loss:>15.4f}" for divergence, loss in costs] or [""] * len(splits)
    print("layers   slots  kept  others' slots" + ("   from the dense model, 1/1000 nats   loss" if costs else ""))
    for a, cost in zip(splits, told, strict=True):
        others = next(n for i, n in enumerate(a.layer_windows) if i not in a.kept_layers) + a.num_sinks
        print(f"{len(a.kept_layers):>6}{a.cache_size:>8}{a.max_separators:>6}{others:>15}{cost}")
    if plain:
        print(f"a window{'':>27}{1000 * plain[0]:>26.2f}{plain[1]:>15.4f}")


def _tell_check(checked: "Check") -> None:
    window, chosen = checked.window, checked.chosen
    print(f"on {chosen.tokens:,} tokens of text that was not chosen by, streamed:")
    for score in (window, chosen):
        print(f"{score.arm:<8}{score.cache_bytes:>14,} bytes a row   perplexity {score.perplexity:.3f}")
    for name, words in (("all", "all"), ("far", f"last said more than {chosen.far} tokens ago")):
        found = checked.of(name)
        if found is not None:
            error = "" if found.difference_error is None else f" +- {found.difference_error:.4f}"
            print(f"{found.difference:+.4f}{error} nats a token beside the window, {words} ({found.tokens:,} tokens)")
