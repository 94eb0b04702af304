"""The part of `sepjax bench peers` that runs under another Python: answers of transformers, timed. Imports no sepjax.

Takes what to do as JSON in its first argument, and prints one line of JSON: {"versions", "cases"}, or {"error"}.
"""

import json
import sys
import time


def run(asked):
    """Times `generate` for each number of rows, over its default cache and over a static one."""
    try:
        import numpy as np
        import torch
        import transformers
    except ImportError as error:
        return {"error": f"lacks {error.name}"}
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype).to(device).eval()
    new, cases = asked["new"], []
    model.generation_config.eos_token_id = None  # nothing ends an answer before its length
    kinds = {"transformers, its default cache": {}}
    if on_gpu:
        kinds["transformers, static cache, compiled"] = {"cache_implementation": "static"}
    for name, cache in kinds.items():
        for file in asked["prompts"]:
            ids = torch.from_numpy(np.load(file)).long().to(device)
            settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, **cache}
            for _ in range(3):
                start = time.perf_counter()
                with torch.inference_mode():
                    answer = model.generate(ids, pad_token_id=0, **settings).cpu()
                seconds = time.perf_counter() - start
            if (made := answer.shape[1] - ids.shape[1]) != new:
                return {"error": f"answered {made} tokens where {new} were asked"}
            cases.append({"name": name, "rows": len(ids), "seconds": seconds})
    return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "cases": cases}


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules have names of packages that transformers looks for
    print(json.dumps(run(json.loads(sys.argv[1]))))
