"""Data: sources of rows, sampling, tasks to train and test on, and prompt sets."""
