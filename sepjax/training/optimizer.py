"""AdamW with linear warm-up, cosine decay and clipping by the global norm, a gate's apart."""

from typing import Any

import jax
import optax

from sepjax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to `learning_rate` over the warm-up, then a cosine down to `final_learning_rate` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps."""
    return optax.chain(
        clip_apart(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed_parameters,
        ),
    )


def clip_apart(max_norm: float) -> optax.GradientTransformation:
    """Clips by the global norm, and a gate's gradients by a norm of their own.

    Together, large ones of a gate would shrink all others.
    """
    clip = optax.clip_by_global_norm(max_norm)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gate = {name: x for name, x in updates.items() if name == "gate"}
        rest = {name: x for name, x in updates.items() if name != "gate"}
        clipped: Any = {}
        for part in (gate, rest):
            clipped |= clip.update(part, state)[0] if part else {}
        return {name: clipped[name] for name in updates}, state

    return optax.GradientTransformation(clip.init, update)


def decayed_parameters(params: Any) -> Any:
    """True for matrices, which weight decay shrinks; False for biases and norm scales, which it must leave alone."""
    # By name: stacked layers give every parameter one more axis, so its rank does not tell.
    matrices = ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in matrices, params)
