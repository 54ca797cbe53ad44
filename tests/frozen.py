"""What all runs need, imported and kept out of garbage collection: accelerate collects after every phase.

A collection looks at half a million objects of torch and timm, which takes half a second and finds nothing.
"""

import gc

import matplotlib.pyplot
import timm
import torchmetrics

import probe_kd.training.run

__all__ = ["matplotlib", "probe_kd", "timm", "torchmetrics"]

gc.collect()
gc.freeze()
