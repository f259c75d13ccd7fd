from cogcommon.checkpoint import open_checkpoint
from cogcommon.tiny import NATIVE


def test_random_forms_open_by_name():
    checkpoint = open_checkpoint("random-tiny-2b")
    assert checkpoint.family.builtin == "tiny-2b"
    assert checkpoint.native == NATIVE
