"""The part of `sepjax bench peers` that runs under another Python: answers of transformers, timed. Imports no sepjax.

Takes what to do as JSON in its first argument, and prints lines of JSON: the versions, then each case as it is timed;
or {"error"}.
"""

import json
import sys
import time


def run(asked):
    """Times `generate` for each file of prompts, over its default cache and over a static one."""
    try:
        import numpy as np
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        yield {"error": f"lacks {error.name}"}
        return
    yield {"torch": torch.__version__, "transformers": transformers.__version__}
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype).to(device)
    model.generation_config.eos_token_id = None  # nothing ends an answer before its length
    kinds = {"transformers, its default cache": {}}
    if on_gpu and asked["compiled"]:
        kinds["transformers, static cache, compiled"] = {"cache_implementation": "static"}
    for name, cache in kinds.items():
        for file in asked["prompts"]:
            ids = torch.from_numpy(np.load(file)).long().to(device)
            settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": asked["new"], "do_sample": False}
            for _ in range(3):
                start = time.perf_counter()
                with torch.inference_mode():
                    answer = model.generate(ids, pad_token_id=0, **settings, **cache).cpu()
                seconds = time.perf_counter() - start
            if (made := answer.shape[1] - ids.shape[1]) != asked["new"]:
                yield {"error": f"answered {made} tokens where {asked['new']} were asked"}
                return
            yield {"name": name, "rows": len(ids), "seconds": seconds}


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules have names of packages that transformers looks for
    for line in run(json.loads(sys.argv[1])):
        print(json.dumps(line), flush=True)
