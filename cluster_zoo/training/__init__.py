"""Training and validation: options, recipes, the parts of a run, the loops."""
