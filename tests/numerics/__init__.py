"""How exact: single passes, rows, every derivative, and random cases against the truth."""
