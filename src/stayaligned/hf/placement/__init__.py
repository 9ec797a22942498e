"""Which stored weight each LoRA layer changes."""
