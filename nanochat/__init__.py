"""nanochat-slurm: a small ChatGPT from raw text, stage by stage."""

__version__ = "0.1.0"
