"""What is trained: layers, attention, blocks, stacks. Sees neither data nor optimizers."""
