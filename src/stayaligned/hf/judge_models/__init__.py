"""Judges that are local models: sequence classifiers and guard models."""
