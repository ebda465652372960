"""querylens_fast: token signatures for every feature of a sparse dictionary."""
