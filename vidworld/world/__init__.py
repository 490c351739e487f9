"""The trained model as a simulator."""
