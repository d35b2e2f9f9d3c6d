"""The parts of a training: its recipe, its pictures and its loop."""
