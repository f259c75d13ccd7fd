"""`cogprep` with other ways of the VAE's encoder: ``python -m workshop.bench_encode.stage JSON encode ...``.

JSON: fields of `cogprep.vae.fused.Ways`, and of `cogprep.vae.kernels.TritonKernels` under "kernels".
"""

from __future__ import annotations

import json
import sys
from functools import partial


def main(ways: str) -> None:
    from cogprep.cli import main as cogprep
    from cogprep.vae import fused, kernels

    chosen = json.loads(ways)
    kernels.TritonKernels = partial(kernels.TritonKernels, **chosen.pop("kernels", {}))  # type: ignore[misc, assignment]
    fused.WAYS = fused.Ways(**chosen)
    cogprep()


if __name__ == "__main__":
    main(sys.argv.pop(1))
