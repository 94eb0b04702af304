"""One row's decode step as one kernel of all layers."""
