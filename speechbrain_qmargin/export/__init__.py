"""A trained encoder for others: one module, SpeechBrain's inference folder, ONNX."""
