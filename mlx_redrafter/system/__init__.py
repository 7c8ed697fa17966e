"""What the machine and the disk need: files, weights, hub, device, BLAS, module slots, tables.

Knows nothing of models.
"""
