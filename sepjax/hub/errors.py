"""What can be wrong with a checkpoint of another project."""

from sepjax.config import UserError


class HubError(UserError, ValueError):
    """A pretrained model that cannot be read or written: the message names the file and the tensor or key."""
