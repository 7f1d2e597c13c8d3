"""Hugging Face checkpoints: what a base must be, which layers are adapted, how a side branch is put in."""
