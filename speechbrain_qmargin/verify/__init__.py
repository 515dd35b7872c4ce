"""From an encoder and a threshold to decisions: enrol people, verify them, find them."""
