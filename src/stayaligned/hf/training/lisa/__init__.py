"""Lisa inside any Trainer: rows, proximal term, losses and checkpoints; `trainer` connects them to the host."""
