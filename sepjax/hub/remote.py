"""Models of the Hugging Face hub: from the local cache, and over the network only when that is asked for."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from sepjax import progress
from sepjax.hub.errors import HubError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # what the name of a model there looks like
KEPT_ARM = "kept.arm"  # what bounded caches of a model keep (`sepjax.kept`), beside it
# Nothing else is ever fetched: no code, no pickled weights. An adapter's config only to be refused.
_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json"]
_FILES += [
    "adapter_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    KEPT_ARM,
]
# Nor the same weights once more, as Mistral's own files or in a folder of another format.
_TWICE = ["consolidated*", "*/*"]


def fetch(name: str, *, download: bool) -> Path:
    """The folder of the model `name` ("owner/model") in the hub's cache, downloaded first if `download`.

    Raises:
      HubError: it is not there and must not or cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with _bars():
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=_FILES, ignore_patterns=_TWICE, local_files_only=not download
            )
    except LocalEntryNotFoundError as error:
        if download:
            raise HubError(f"cannot download {name!r}: {error}") from error
        raise HubError(
            f"there is no {name!r} here, neither as a path nor in the hub's local cache; to download it from the "
            "Hugging Face hub, say so: --download, or sepjax.load(..., download=True)"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise HubError(f"cannot download {name!r}: {error}") from error
    return Path(folder)


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """The hub's own progress bars, where ours would be shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides = not progress.is_shown() and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()
