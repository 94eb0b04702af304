"""What a pod user wants to know before paying: a training step compiled for TPUs or H100s that are elsewhere.

    python -m sepjax.sharding plan --config=configs/llama3_8b.py --topology=v5p:8x8x16 [--largest=12]
    python -m sepjax.sharding plan --config=configs/llama3_8b.py --topology=h100:8x8    8 hosts of 8 GPUs

Prints the memory of a device, the collectives of a step and the largest arrays. Needs the package libtpu and no TPU, or
JAX's CUDA plugin and no GPU.
"""

import sys

from absl import flags

from sepjax.config import Config
from sepjax.flags import run_main
from sepjax.training.plan import compile_here, main

if __name__ == "__main__":
    if sys.argv[1:2] != ["plan"] and not any("help" in argument for argument in sys.argv[1:2]):
        print(
            "error: expected `plan`: python -m sepjax.sharding plan --config=FILE --topology=v5e:16x16", file=sys.stderr
        )
        raise SystemExit(2)
    sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "plan")]
    TOPOLOGY = flags.DEFINE_string("topology", None, "grid of chips: v5e:16x16, v5p:8x8x16, h100:8x8", required=True)
    LARGEST = flags.DEFINE_integer("largest", 12, "arrays to list", lower_bound=0)

    def _main(config: Config) -> None:
        compile_here()
        main(config, TOPOLOGY.value, LARGEST.value)

    run_main(_main, with_config=True)
