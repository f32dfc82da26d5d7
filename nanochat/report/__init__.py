"""The report of a run, made from its files alone: no torch, no code that made them."""
