"""Measures a trained model: perplexity of text, tasks of lm-eval, likeness of its text to references; the command."""
