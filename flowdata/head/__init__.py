"""A language model's output layer, tile by tile: losses and gradients without the logits.

output_layer.py reads the layer off a model; tiled.py makes the losses that a scorer keeps, from the
tiles of tiles.py or by the kernel of triton.py, whose sums tally.py defines; fused_loss.py makes a
training loss and its gradients; cross_entropy.py does so from logits that a model has made.
"""
