"""Experiments and grids: their configuration, their stages on disk, and how they run."""
