"""From a trained GoogLeNet to a verified, deployable INT8 bundle for one edge device."""

__version__ = "0.1.0"
