"""The inputs of ``benchmarks/attacks.py``: a module for each kind of file."""
