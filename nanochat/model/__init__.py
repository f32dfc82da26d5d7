"""The model, its attention and cache, its loss, its optimizer, its files."""
