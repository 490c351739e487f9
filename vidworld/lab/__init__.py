"""Ground-truth simulators."""
