"""Programs of whole CUDA graphs: how they are compiled.

All of a program is one graph, its loops and branches too. Without that the host starts each kernel, and looks at the
device's answer at each branch and each turn of a loop: it is held up until the last, and the device waits for it in
between. What XLA leaves to a library's own launches (a sort of many numbers) can be in no graph, nor can the branch and
the loop around it, so programs of steps have none (`sepjax.generation.sampling`).
"""

import os

import jax

_WHOLE = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}


def compiler_options() -> dict[str, str] | None:
    """For `jax.jit`, on a GPU; None elsewhere. SEPJAX_GRAPHS=0 in the environment leaves it to XLA."""
    return _WHOLE if jax.default_backend() == "gpu" and os.environ.get("SEPJAX_GRAPHS", "1") != "0" else None
