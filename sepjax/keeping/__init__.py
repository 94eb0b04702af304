"""Which tokens are worth keeping: tables of ids measured on a model, and gates that learn it from dense attention."""

import dataclasses

MEASURES = ("rarity", "attention", "loss")  # what an id's worth may be measured by (sepjax/keeping/measure.py)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """How much a gate reads and learns."""

    rows: int = 512  # of data.sequence_length tokens, from the training split
    held_out: int = 32  # from the evaluation split, to grade the gate by
    steps: int = 2000  # of Adam, for each of the three losses
    learning_rate: float = 1e-3
