"""The package as it is shipped: names, README, examples, exports, and what they cost."""
