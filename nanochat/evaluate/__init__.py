"""Scores of a trained stage, each beside chance."""
