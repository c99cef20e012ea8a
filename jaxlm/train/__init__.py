"""From a configuration to a trained model: optimizer, loss, state, step, loop, evaluation."""
