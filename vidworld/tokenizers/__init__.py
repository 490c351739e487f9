"""Video autoencoders behind one protocol."""
