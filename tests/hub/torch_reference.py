"""What transformers makes of the tiny checkpoints. Needs torch and transformers, and none of sepjax.

python tests/hub/torch_reference.py golden              writes golden.json and golden.npz
python tests/hub/torch_reference.py logits FOLDER OUT   logits of the model in a folder, as .npy
python tests/hub/torch_reference.py serve               the same for each folder that stdin names, a line each, to
                                                        logits.npy in it; answers "ok" or why there are none
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import tiny


def masks(config):
    """A mask of separators as the model takes it: one, or one for each kind of layers, within their own window."""
    own = getattr(config, "sliding_window", None)
    kinds = {"full_attention": tiny.visible(), "sliding_attention": tiny.visible(own)}
    added = {
        name: torch.where(torch.tensor(mask)[:, None], 0.0, torch.finfo(torch.float32).min)
        for name, mask in kinds.items()
    }
    return added if getattr(config, "layer_types", None) else added["sliding_attention"]


def logits(model, mask=None):
    ids = torch.tensor(tiny.tokens())
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.numpy()


def greedy(model):
    ids = torch.tensor(tiny.tokens()[:1])
    for _ in range(tiny.NEW_TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, tiny.LENGTH :].numpy()


def build(kind, settings):
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {}
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name not in tied:  # in files GPT-NeoX's head has a name that the module no longer has
                in_file = name.replace("lm_head", "embed_out") if kind == "gpt_neox" else name
                shapes[in_file] = list(x.shape)
                x.copy_(torch.from_numpy(tiny.weight(in_file, tuple(x.shape))))
    return model, shapes


def rope(kind, keys):
    values = tiny.shape_of(kind, copy.deepcopy(keys))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), pad_token_id=0, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind in tiny.WITH_KINDS:
        turning = model.model.rotary_emb
        of = {"": "full_attention_", "-sliding": "sliding_attention_"}
    else:
        turning, of = next(module for module in model.modules() if hasattr(module, "inv_freq")), {"": ""}
    found = {}
    for kind, name in of.items():
        found[f"w{kind}"] = getattr(turning, f"{name}inv_freq").numpy()
        found[f"m{kind}"] = np.float64(getattr(turning, f"{name}attention_scaling"))
    return found


def write_golden():
    manifest, arrays = {}, {}
    for name, (kind, settings) in tiny.VARIANTS.items():
        model, shapes = build(kind, settings)
        config = json.loads(model.config.to_json_string(use_diff=False))
        keep = {
            k: v
            for k, v in config.items()
            if k in settings
            or k in ("model_type", "rope_parameters", "rms_norm_eps", "num_ln_in_parallel_attn")
            or (k == "layer_types" and v)
        }
        manifest[name] = {"config": keep, "shapes": shapes, "transformers": transformers.__version__}
        results = {"logits": logits(model), "masked": logits(model, masks(model.config)), "greedy": greedy(model)}
        arrays |= {f"{name}/{key}": value for key, value in results.items()}
        print(name, float(np.abs(results["logits"]).max()), float(np.abs(results["logits"] - results["masked"]).max()))
    for name, keys in tiny.ROPES.items():
        arrays |= {f"rope/{name}/{key}": value for key, value in rope(*keys).items()}
    (tiny.HERE / "golden.json").write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in manifest.items()) + "\n}\n"
    )
    np.savez_compressed(tiny.HERE / "golden.npz", **arrays)


def read(folder):
    """The model, and what it lacks in the files."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), sorted(info["missing_keys"]) + [str(x) for x in info["mismatched_keys"]]


def serve():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        folder = Path(line.strip())
        try:
            model, missing = read(folder)
            answer = f"no weights for {missing[0]}" if missing else "ok"
            if not missing:
                np.save(folder / "logits.npy", logits(model))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print("answer " + " ".join(answer.split())[:300], flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "golden":
        write_golden()
    elif sys.argv[1] == "serve":
        serve()
    else:
        np.save(sys.argv[3], logits(read(sys.argv[2])[0]))
