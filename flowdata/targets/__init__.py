"""What outputs and labels mean: which loss a model has, and the loss of every target."""
