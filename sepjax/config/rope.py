"""The settings of the rotary position embedding, and what is wrong with them."""

import dataclasses
import math

SCALINGS = ("none", "linear", "llama3", "yarn")
_MOST = 3e38  # of a base: float32 holds it


@dataclasses.dataclass(unsafe_hash=True)
class RopeConfig:
    """Rotary position embedding and its scalings (names as in Hugging Face configs)."""

    base: float = 10_000.0  # base of the frequencies
    fraction: float = 1.0  # share of each head's dimensions that is rotated; GPT-NeoX 0.25
    scaling: str = "none"  # "none" | "linear" | "llama3" | "yarn"
    factor: float = 1.0  # context length over `original_context`
    original_context: int = 8192  # context length of the original training
    low_frequency_factor: float = 1.0  # scaling="llama3": full scaling up to this many rotations in original_context
    high_frequency_factor: float = 4.0  # scaling="llama3": no scaling from this many rotations on
    beta_fast: float = 32.0  # scaling="yarn": no scaling from this many rotations on
    beta_slow: float = 1.0  # scaling="yarn": full scaling up to this many rotations
    truncate: bool = True  # scaling="yarn": the ramp begins and ends at whole dimensions
    # factor on cosine and sine; 0: the default of the scaling, 0.1 ln(factor) + 1 for yarn and 1 for others
    attention_factor: float = 0.0

    def fault(self, head_dim: int) -> str | None:
        """What cannot work with heads of this size, in words that follow "model.rope."; None if all can."""
        if not 1 < self.base <= _MOST:
            return f"base={self.base} must be above 1 and at most {_MOST:g}"
        for name, least in (("factor", 1), ("original_context", 1), ("attention_factor", 0)):
            if not least <= getattr(self, name) < math.inf:
                return f"{name}={getattr(self, name)} must be {least} or more"
        for name in ("low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                return f"{name}={getattr(self, name)} must be above 0"
        if self.low_frequency_factor >= self.high_frequency_factor:
            return f"low_frequency_factor={self.low_frequency_factor} must be below high_frequency_factor"
        if self.beta_slow >= self.beta_fast:
            return f"beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}"
        rotated = self.fraction * head_dim
        if rotated % 2 or not 0 < self.fraction <= 1:
            return (
                f"fraction={self.fraction} of head_dim={head_dim} rotates {rotated:g} dimensions; "
                "it must be an even number above 0 and at most head_dim"
            )
        return None


def same_rope() -> RopeConfig:
    """For layers of another kind: rotated as the others are."""
    return RopeConfig(base=0.0)
