"""The command line of conversions: `python -m sepjax.hub convert --source=... --target=...` (`sepjax.hub.convert`)."""

import sys
from pathlib import Path

from absl import flags

from sepjax.flags import run_main
from sepjax.hub.convert import convert

if __name__ == "__main__":
    SOURCE = flags.DEFINE_string("source", None, "a workdir, a Hugging Face folder, a GGUF file", required=True)
    TARGET = flags.DEFINE_string("target", None, "folder to write, new or empty", required=True)
    DTYPE = flags.DEFINE_string("dtype", None, "of the tensors of a Hugging Face folder; default: the origin's")
    STEP = flags.DEFINE_integer("step", None, "checkpoint of a workdir; default: the newest")

    def main() -> None:
        """Converts."""
        print(convert(Path(SOURCE.value), Path(TARGET.value), dtype=DTYPE.value, step=STEP.value))

    if sys.argv[1:2] != ["convert"]:
        print("usage: python -m sepjax.hub convert --source=... --target=... [--dtype=bfloat16]", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_main(main)
