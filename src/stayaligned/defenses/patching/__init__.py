"""Patch finished adapters and models layer by layer, on disk or in memory."""
