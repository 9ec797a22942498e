"""The configuration of an experiment: YAML to frozen values, every error at once."""
