"""What a process that serves is given before it begins. For programs: it holds for the whole process."""

import gc
import resource
import sys

_FILES = 1 << 16  # that may be open: each connection is one, and reading a conversation takes some
# Seconds after which a thread that computes in Python lets another one go on. The threads that step the slots and ask
# the device wait for the others so long, many times a step; Python's own 5 ms are as long as a whole step.
_SWITCH = 1e-4
# New objects, and collections of the younger of them, between two collections of garbage: each also has JAX look for
# arrays that nobody has, and those of the oldest look at all that was ever imported.
_GARBAGE = 50_000, 20, 100


def prepare() -> None:
    """More open files, as far as this process may raise their number itself; shorter turns of its threads, less often
    interrupted.
    """
    sys.setswitchinterval(_SWITCH)
    gc.set_threshold(*_GARBAGE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
