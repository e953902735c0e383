"""Language models: packing, attention over packed samples, and the ways to a loss."""
