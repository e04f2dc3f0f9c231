"""The truth in higher precision, what is allowed beside it, and the numbers to try."""
