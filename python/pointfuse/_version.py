"""The version of pointfuse, and nothing else: setup.py reads this file without importing torch."""

__version__ = "0.1.0"
