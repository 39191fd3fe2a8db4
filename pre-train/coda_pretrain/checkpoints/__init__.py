"""Checkpoints: saved whole or not at all, continued only with what they were made of, exported to safetensors."""
