"""What arguments must be, told in the caller's names. Values are never read."""
