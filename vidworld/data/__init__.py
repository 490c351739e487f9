"""Datasets: shards, manifest, sources, sample order and loader."""
