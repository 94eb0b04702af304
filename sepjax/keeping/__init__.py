"""Which tokens are worth keeping: tables of ids measured on a model."""

MEASURES = ("rarity", "attention", "loss")  # what an id's worth may be measured by (sepjax/keeping/measure.py)
