"""Gates for a model as it is: which tokens its dense attention looks at from afar, learned by a small network."""
