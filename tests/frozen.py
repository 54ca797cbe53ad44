"""What all runs need, imported and kept out of garbage collection: accelerate collects after every phase.

A collection looks at half a million objects of torch and timm, which takes half a second and finds nothing. And files
are not forced to the disk, which takes a tenth of a run: no test cuts the power, and a killed process loses nothing.
"""

import gc
import os

import matplotlib.pyplot
import timm
import torchmetrics

import probe_kd.training.run

__all__ = ["matplotlib", "probe_kd", "timm", "torchmetrics"]

os.fsync = lambda handle: None
gc.collect()
gc.freeze()
