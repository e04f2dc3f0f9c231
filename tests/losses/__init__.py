"""The other losses, the statistics of tokens, and what is made of them."""
