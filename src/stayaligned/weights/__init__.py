"""Weights on disk: safetensors, checkpoints, adapters and their differences, without a host library."""
