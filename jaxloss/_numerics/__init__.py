"""The mathematics of one row of logits: parts of its classes, their merge, the exact gradient."""
