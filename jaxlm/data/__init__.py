"""From text to device batches: tokenizers, token folders, mixtures, packing, the loader. Sees no model and no loop."""
