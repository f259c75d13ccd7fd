"""A child that puts back what a folder has lost, on a disk that is full from its n-th write on, for every n.

Usage: full_disk_driver.py LOST WORK, under full_disk.c. Prints one JSON line a number: what `cogprep index` said, and
what is in the folder once there was room again and it had been run once more. Then it verifies the folder, on the full
disk, and prints how far apart a second encode is.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

from cogcommon.errors import DiskError
from cogcommon.shards.records import read_record
from cogprep.commands.index import index
from cogprep.commands.verify import verify


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def rows(out):
    """The samples in every record, by name; the bytes are parquet's own business."""
    return {
        path.name: [[row.key, row.sha256.hex()] for row in read_record(path).rows] for path in out.rglob("*.parquet")
    }


def main(lost, work):
    layer = ctypes.CDLL(None)
    number, refused = 0, True
    while refused:
        number += 1
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(lost, work)
        layer.full_disk(f"{work}*".encode(), ctypes.c_long(number))
        said = ""
        try:
            index(work)
        except DiskError as error:
            said = str(error)
        refused = layer.full_disk_writes() >= number
        layer.full_disk(b"", ctypes.c_long(-1))
        left = files(work)
        index(work)
        print(json.dumps({"said": said, "refused": refused, "left": left, "files": files(work), "rows": rows(work)}))
    layer.full_disk(f"{work}*".encode(), ctypes.c_long(1))
    os.environ["FULL_DISK"] = f"{work}*"  # of the processes that decode
    print(json.dumps([difference.largest for difference in verify(work, reencode=1).differences]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
