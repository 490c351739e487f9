"""Rollouts from files, metrics and reports."""
