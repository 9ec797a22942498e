"""Where the jobs of a grid run."""
