"""What iterations per step and reuse of solutions do for the images of the embedded FPDM (FPDM paper, Figure 6 a).

python -m benchmarks.fpdm_reuse [--images 256] [--steps 50] [--seed 0]
"""

from __future__ import annotations

import argparse

from fixpoint_diffusion.evaluation import digit_quality
from fixpoint_diffusion.experiments.fpdm import embedded_fpdm
from fixpoint_diffusion.processes import initial_noise
from fixpoint_diffusion.sampling import sample_fpdm


def main() -> None:
    """Print the classifier's confidence in the samples, relative to that in real digits which it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, schedule = embedded_fpdm()
    x_T = initial_noise(options.seed, range(options.images), model.config.sample_shape)
    counts = (1, 2, 4, 8)
    print(f"{options.images} images in {options.steps} steps, seed {options.seed}: relative confidence")
    print("iterations per step" + "".join(f"{count:>8}" for count in counts))
    for label, reuse in (("with reuse", True), ("without reuse", False)):
        runs = (sample_fpdm(model, x_T, schedule, steps=options.steps, iterations=k, reuse=reuse) for k in counts)
        print(label.ljust(19) + "".join(f"{digit_quality(run.images).relative_confidence:8.3f}" for run in runs))


if __name__ == "__main__":
    main()
