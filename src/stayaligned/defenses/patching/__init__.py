"""Finished adapters and models patched on disk or in memory, layer by layer."""
