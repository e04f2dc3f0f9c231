"""What JAX and XLA make us write: meshes, derivative rules, dtypes, gathers, and the forms of a
pass that a compiler fuses. Nothing here knows what a loss is."""
