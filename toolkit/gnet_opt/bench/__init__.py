"""Measuring: accuracy of logits against logits, latency of artifacts in processes of their own."""
