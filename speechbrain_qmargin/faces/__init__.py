"""What faces are tested on: pair sets over ten folds, and IJB-B and IJB-C."""
