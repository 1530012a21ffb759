"""The version of the package: `setup.py` reads it from here without importing TensorFlow."""

__version__ = "1.0.0rc1"
