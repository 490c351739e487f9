"""One module for each kind of robot log."""
