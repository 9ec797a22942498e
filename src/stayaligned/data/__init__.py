"""Rows to train on and prompts to ask: sources, sampling, tasks and prompt sets."""
