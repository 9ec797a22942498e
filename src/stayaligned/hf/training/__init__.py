"""Fine-tuning by the Trainers of transformers and TRL."""
