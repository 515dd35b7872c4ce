"""Q-Margin for SpeechBrain: a sparse alpha-divergence margin loss for speaker and face verification."""

__version__ = "0.1.0"
