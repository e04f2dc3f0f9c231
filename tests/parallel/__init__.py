"""Meshes of devices, explicit or by name, and several processes."""
