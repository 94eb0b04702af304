"""The one error of this package that is the user's to mend, and what other libraries' errors say."""

from sepjax.config import UserError


class DataError(UserError, ValueError):
    """Text, a dataset or a tokenizer that cannot be used: the message names it, the reason and the way out."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says."""
    return str(error).strip().partition("\n")[0]
