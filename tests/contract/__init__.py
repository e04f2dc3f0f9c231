"""What is promised: labels, options, errors, and every bug that was found once."""
