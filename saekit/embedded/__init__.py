"""The embedded language model: a Hugging Face folder made by ``scripts/train_embedded_model.py``."""
