"""Backpropagation written by hand, inside PyTorch."""
