"""Low-rank adapters: the section `lora` of a config, its checks, and what adapters weigh."""

import dataclasses
import math

from sepjax.config.checks import ConfigError, at_least, nearest
from sepjax.config.model import ModelConfig

ALL = "all"


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
    """Post-training by low-rank adapters (arXiv 2106.09685): W x + alpha / rank * B A x, of which A and B learn."""

    rank: int = 0  # rows of A and columns of B; 0: no adapters, all parameters are trained
    alpha: float = 16.0  # the output of adapters is multiplied by alpha / rank
    # matrices that get an adapter, in every layer: query, key, value, out, gate, up, down; or "all"
    targets: tuple[str, ...] = (ALL,)

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank


def projections(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a layer: name -> (numbers that it reads, numbers that it writes)."""
    D, N, K = model.embed_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    found = {"query": (D, N), "key": (D, K), "value": (D, K), "out": (N, D)}
    gate = {"gate": (D, model.mlp_dim)} if model.gated_mlp else {}
    return found | gate | {"up": (D, model.mlp_dim), "down": (model.mlp_dim, D)}


def targets_of(lora: LoraConfig, model: ModelConfig) -> tuple[str, ...]:
    """The matrices that get adapters, in the order of `projections`."""
    return tuple(name for name in projections(model) if name in lora.targets or ALL in lora.targets)


def adapter_parameters(lora: LoraConfig, model: ModelConfig) -> int:
    """Numbers in all A and B."""
    sides = projections(model)
    return model.num_layers * sum(lora.rank * sum(sides[name]) for name in targets_of(lora, model))


def validate_lora(lora: LoraConfig, init_from: str) -> None:
    """Raises ConfigError for adapters that no model can have, or that nothing is there for.

    The shape that they are for is known once that of `init_from` is: `check_adapters`.
    """
    at_least("lora.rank", lora.rank, 0)
    if not 0 < lora.alpha < math.inf:
        raise ConfigError(f"lora.alpha={lora.alpha} must be above 0; it is twice lora.rank as a rule")
    _check_names(lora, ModelConfig(gated_mlp=True), "a")
    if (
        not lora.targets
        or len(set(lora.targets)) < len(lora.targets)
        or (ALL in lora.targets and len(lora.targets) > 1)
    ):
        raise ConfigError(
            f"lora.targets={','.join(lora.targets)!r} must be {ALL}, or names of matrices, each once: "
            f"{', '.join(projections(ModelConfig(gated_mlp=True)))}"
        )
    if not lora.rank:
        for name in ("alpha", "targets"):
            if (given := getattr(lora, name)) != getattr(LoraConfig(), name):
                shown = given if name == "alpha" else ",".join(given)
                raise ConfigError(f"lora.{name}={shown} does nothing without lora.rank; set that too, or leave it out")
        return
    if not init_from:
        raise ConfigError(
            f"lora.rank={lora.rank} without training.init_from: adapters change a model that has learned; name one, or "
            "set lora.rank=0 to train every parameter"
        )


def check_adapters(lora: LoraConfig, model: ModelConfig) -> None:
    """Raises ConfigError for adapters that a model of this shape cannot have; `lora` has passed `validate_lora`."""
    _check_names(lora, model, "this")
    for name in targets_of(lora, model):
        if lora.rank > min(projections(model)[name]):
            raise ConfigError(
                f"lora.rank={lora.rank} is above the {min(projections(model)[name])} that the matrix {name!r} has at "
                "most; lower it, leave that matrix out of lora.targets, or set lora.rank=0 to train every parameter"
            )


def _check_names(lora: LoraConfig, model: ModelConfig, whose: str) -> None:
    known = (*projections(model), ALL)
    for name in lora.targets:
        if name not in known:
            raise ConfigError(
                f"lora.targets has {name!r}, which is not one of {whose} model's matrices, {', '.join(known)}"
                f"{nearest(name, known)}"
            )
