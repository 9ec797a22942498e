"""Judges that are local models: classifiers and guards."""
