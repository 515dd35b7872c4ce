"""Corpora: what is on disk becomes manifests."""
