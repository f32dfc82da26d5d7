"""Inference: the engine, sampling, the calculator, the terminal chat."""
