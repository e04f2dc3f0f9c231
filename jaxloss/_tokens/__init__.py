"""From labels to one number: what each token asks for, its loss, their weighted sum or mean."""
