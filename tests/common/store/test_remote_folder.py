"""What stores say of an object and of a refusal, each in its own words."""

import datetime

import pytest

from cogcommon.store.fsspec_store import _codes, _says_there_is_one
from cogcommon.store.remote_folder import _entry


@pytest.mark.parametrize("name", ["LastModified", "last_modified", "mtime"])
def test_the_age_of_an_object_is_known_whoever_says_it(name):
    written = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=2)
    text = {} if name != "mtime" else {"updated": written.isoformat()}  # gcsfs gives both
    assert _entry({"size": 3, "etag": "a", name: written, **text}).age == pytest.approx(120, abs=10)


def failed(text, **told):
    error = OSError(text)
    for key, value in told.items():
        setattr(error, key, value)
    return error


def test_digits_in_an_address_are_no_status():
    assert "416" not in set(_codes(failed("Read timeout on https://bucket/000416.tar")))
    assert "416" in set(_codes(failed("no such range", status=416)))
    inner = OSError("invalid")
    inner.__cause__ = failed("range", response={"Error": {"Code": "InvalidRange"}})
    assert "InvalidRange" in set(_codes(inner))
    assert not _says_there_is_one(failed("timeout for 000412.tar")) and _says_there_is_one(failed("no", code=412))
