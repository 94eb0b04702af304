"""Scores that are no numbers: a row whose logits are NaN or infinite ends, and says so.

The device puts `LOST` in the place of the token, so nothing more is fetched and no step waits for it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sepjax.array_typing import Array, Bool, Float, Int32
from sepjax.config import UserError

LOST = -2  # in place of a token; -1 is "none was drawn"
WORDS = (
    "the model's scores of the next token are not numbers (NaN or infinite): its weights are damaged, or its numbers "
    "overflow in their dtype; check the files, or take another checkpoint"
)


class NotNumbers(UserError, ArithmeticError):
    """The model's scores are NaN or infinite, so there is nothing to draw from."""


def is_lost(logits: Float[Array, "B V"], drawn: Int32[Array, "B"]) -> Bool[jax.Array, "B"]:
    """Which rows drew from scores that are no numbers: `sample` and argmax give the place of a NaN where there is one.

    Looks at one score a row.
    """
    return ~jnp.isfinite(jnp.take_along_axis(jnp.asarray(logits), drawn[:, None], axis=1)[:, 0])


def check_scores(values: np.ndarray, what: str) -> None:
    """Raises NotNumbers where a score of `what` is NaN or infinite: comparisons with NaN only look like answers."""
    if not np.isfinite(values).all():
        raise NotNumbers(f"{what}: {WORDS}")


def check(reason: str | None, tokens: int) -> None:
    """Raises NotNumbers for the `finish_reason` "error", with the number of tokens that the cache had taken up."""
    if reason == "error":
        raise NotNumbers(f"after {tokens} tokens {WORDS}")
