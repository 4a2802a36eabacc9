"""``python -m fixpoint_diffusion``: the command ``fixpoint-diffusion``, as ``torchrun -m`` starts it."""

from fixpoint_diffusion.cli import main

if __name__ == "__main__":
    main()
