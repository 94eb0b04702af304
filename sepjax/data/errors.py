"""The one error of this package that is the user's to mend."""

from sepjax.config import UserError


class DataError(UserError, ValueError):
    """Text, a dataset or a tokenizer that cannot be used: the message names it, the reason and the way out."""
