"""Trials to scores to report."""
