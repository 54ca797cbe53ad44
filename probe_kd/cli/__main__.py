"""`python -m probe_kd.cli`, which torchrun and accelerate launch run."""

from probe_kd.cli.app import main

main()
