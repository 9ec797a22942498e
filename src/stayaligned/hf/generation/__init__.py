"""Generation of completions, and their likelihood under another model."""
