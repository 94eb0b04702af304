"""Which tokens are worth keeping: tables of ids measured on a model."""
