"""`python -m sepjax` and the console script `sepjax`: one command, a subcommand a job (`sepjax.programs`)."""

import sys

from sepjax import interrupt


def main() -> None:
    """Runs what the command line asks for."""
    interrupt.end_in_one_line()  # first, for the imports of most programs take seconds
    from sepjax.programs import main as run

    run(sys.argv[1:])


if __name__ == "__main__":
    __spec__ = None  # so that readers of data, processes of their own, run this file again: for the lines below
    main()
elif "__mp_main__" in sys.modules:
    interrupt.leave_to_parent()
