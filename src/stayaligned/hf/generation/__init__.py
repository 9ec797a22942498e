"""Completions and their perplexity by transformers."""
