"""Continues text with a trained model: decoding with a KV cache, sampling, the command."""
