"""A real autoregressive model through every room: what `real_model.py` runs, stage by stage."""
