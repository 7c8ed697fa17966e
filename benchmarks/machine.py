"""What a figure has to be read with: the device, the versions, the BLAS, the models' types and sizes."""

from __future__ import annotations
