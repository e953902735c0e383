"""A language model's output layer, tile by tile: losses and gradients without the logits.

- output_layer.py reads the layer off a model.
- For scoring: tiled.py makes the losses of rows, from the tiles of tiles.py or with the kernel of
  triton.py. Both give the sums that tally.py defines.
- For training: fused_loss.py makes a loss, and gradients.py its gradients in the same pass;
  largest.py keeps each row's largest logits; cross_entropy.py makes losses from the logits that a
  model has returned.
- For the distance of two models: kl.py makes divergences of two layers (kl_triton.py on a GPU) and
  kl_loss.py their gradients; kl_logits.py makes both from logits that two models have returned.
"""
