"""What a process that serves is given before it begins. For programs: it holds for the whole process."""

import resource
import sys

_FILES = 1 << 16  # that may be open: each connection is one, and reading a conversation takes some
# Seconds after which a thread that computes in Python lets another one go on. The thread that steps the slots waits for
# the event loop so long, several times a step; Python's own 5 ms are as long as a whole step.
_SWITCH = 5e-4


def prepare() -> None:
    """More open files, as far as this process may raise their number itself, and shorter turns of its threads."""
    sys.setswitchinterval(_SWITCH)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
