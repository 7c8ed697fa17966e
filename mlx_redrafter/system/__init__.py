"""What the machine and the disk need: files, weights, hub, device, threads, BLAS, module slots, tables.

Knows nothing of models.
"""
