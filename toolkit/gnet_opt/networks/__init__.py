"""Network definitions that torchvision does not have.

The modules in here import torch at their top, so import them inside functions only.
"""
