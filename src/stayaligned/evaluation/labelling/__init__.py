"""People's labels of completions: a draw with known probabilities, a store, a local page, CSV. Imports no torch."""
