"""What is measured, each by a command of its own: `python -m sepjax.bench.attention`, and so on.

This is the top floor: a bench may import from every room, and no room imports a bench.
"""
