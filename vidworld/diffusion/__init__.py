"""Diffusion maths; the model arrives as a callable."""
