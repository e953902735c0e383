"""A language model's output layer, tile by tile: losses and gradients without the logits."""
