"""Training with the Trainers of transformers and TRL."""
