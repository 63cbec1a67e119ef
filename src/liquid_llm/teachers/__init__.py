"""What a training step asks: teachers in memory and in stores, and the router that says which type asks which."""
