"""How rows are dealt to passes of a compiled program."""


def rows_of_pass(count: int, most: int) -> int:
    """Rows of every pass, `most` at most, so that there are as few passes as can be and hardly a row is empty.

    All passes have as many: nothing is compiled again for what is left, and a single row is a pass of one.
    """
    passes = -(-count // most)
    return -(-count // max(passes, 1))
