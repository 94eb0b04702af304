"""measures which layers use the distant past, and splits a cache's memory by it

    sepjax layers --model=smollm2-135m --text=books/ --slots=800 --output=smollm2.arm
    sepjax generate --model=smollm2-135m --stream --arm=@smollm2.arm --prompt="Once"

Layers that gain most by it keep watched tokens, the others have a window alone (docs/keeping.md).
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from sepjax.command.settings import AtLeast
from sepjax.command.settings import Settings as _Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Settings):
    """Which model, on which text."""

    model: str  # what sepjax.load reads: a workdir, a folder, a GGUF file
    text: str  # a .txt file or a folder of them, like what will be read
    slots: Annotated[int, AtLeast(64)] = 800  # of a layer, averaged over the layers
    layers: Annotated[int, AtLeast(0)] = 0  # that keep tokens; 0: a quarter of the model's
    length: Annotated[int, AtLeast(2)] = 2048  # tokens of a measured row
    max_tokens: Annotated[int, AtLeast(1)] = 16_384  # measured at most
    output: str = "layers.arm"  # the settings, for --arm=@FILE


def main(settings: Settings) -> None:
    """Writes the settings and says what each layer gains."""
    import numpy as np

    from sepjax.config import ConfigError
    from sepjax.evaluation.documents import read_texts
    from sepjax.evaluation.perplexity import token_windows
    from sepjax.files import check_file, write_text
    from sepjax.generation.cache.mixed import bounded_sizes
    from sepjax.keeping.layers import as_arm, best_layers, split_memory
    from sepjax.keeping.measure import gains_of_layers
    from sepjax.keeping.table import rows_with_a_past
    from sepjax.loading import load

    check_file(settings.output)
    window = settings.slots * 3 // 4
    if settings.length <= window:
        raise ConfigError(
            f"--length={settings.length} has nothing beyond the {window} tokens that --slots={settings.slots} leaves "
            f"other layers; raise it to {2 * settings.slots} or more"
        )
    model, tokenizer = load(settings.model)
    number = settings.layers or max(1, model.config.num_layers // 4)
    trial = split_memory(model.config, range(number), settings.slots, model.attention)
    bounded_sizes(model.config, trial)  # says what no such cache serves, before minutes of measuring
    texts = token_windows(tokenizer, read_texts(Path(settings.text)), settings.length).ids
    rows = rows_with_a_past(texts, window, settings.length, settings.max_tokens)
    gains = gains_of_layers(model, rows, window_size=window, num_sinks=model.attention.num_sinks)
    if not np.isfinite(gains).all():
        raise ConfigError(f"on rows of {settings.length} tokens the model's losses are not finite; lower --length")
    chosen = best_layers(gains, number)
    attention = split_memory(model.config, chosen, settings.slots, model.attention)
    write_text(settings.output, as_arm(attention) + "\n")
    print(f"what each layer's view beyond {window} tokens gives, in 1/1000 nats a token; * keeps tokens")
    for i, gain in enumerate(gains):
        print(f"{'*' if i in chosen else ' '} layer {i:>2}  {1000 * gain:>7.2f}")
    print(as_arm(attention))
    print(f"written to {settings.output}: --arm=@{settings.output} of sepjax generate, chat and serve")
