"""jaxlm: Transformer language models on any device mesh, with JAX."""

__version__ = "0.1.0"
