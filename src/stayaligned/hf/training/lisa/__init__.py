"""Lisa inside any Trainer: rows, pull, losses and checkpoints, each a module; `trainer` puts them into the host."""
