"""A driver that can be killed: encodes on a Ray cluster with actors that take their time.

``python ray_driver.py FOLDER OUT ADDRESS LOG SECONDS`` encodes FOLDER/ds.
"""

import sys
from pathlib import Path

from ray_nodes import an_actor, encode_on_nodes

from cogprep.settings.encode import EncodeSettings

if __name__ == "__main__":
    folder, out, address, log, seconds = sys.argv[1:]
    settings = EncodeSettings(
        data_root=Path(folder) / "ds", out=Path(out), model="tiny", resolution=["9x64x96"], shard_samples=2, workers=1,
        engine="ray", ray_address=address, node_timeout=8.0,
    )  # fmt: skip
    encode_on_nodes(settings, an_actor(Path(log), float(seconds)))
