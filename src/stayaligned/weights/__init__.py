"""Weights on disk: safetensors, checkpoints and their differences, adapters, subspace files. No host library."""
