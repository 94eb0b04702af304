"""Gates for a model as it is: which tokens its dense attention looks at from afar, learned by a small network."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Lesson:
    """How much is read and learned."""

    rows: int = 512  # of data.sequence_length tokens, from the training split
    held_out: int = 32  # from the evaluation split, to grade the gate by
    steps: int = 2000  # of Adam, for each of the two losses
    learning_rate: float = 1e-3
