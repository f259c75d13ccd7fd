"""What stores say of an object and of a refusal, each in its own words; and what is no store."""

import datetime

import pytest

from cogcommon.errors import SettingError
from cogcommon.store.fsspec_store import _codes, _refused, _says_there_is_one
from cogcommon.store.remote_folder import _entry, open_folder
from cogcommon.store.store import without_secrets


@pytest.mark.parametrize(
    ("address", "says"), [("file:///nfs/run", "no object store"), ("https://host/run", "takes no files")]
)
def test_what_takes_no_objects_is_refused(address, says):
    """A folder of this machine took the first, and the run trained on without its mirror."""
    with pytest.raises(SettingError, match=says) as caught:
        open_folder(address, "--mirror")
    assert caught.value.where == f"--mirror {address}"


@pytest.mark.parametrize("name", ["LastModified", "last_modified", "mtime"])
def test_the_age_of_an_object_is_known_whoever_says_it(name):
    written = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=2)
    text = {} if name != "mtime" else {"updated": written.isoformat()}  # gcsfs gives both
    age = _entry({"size": 3, "etag": "a", name: written, **text}).age
    assert 120 <= age <= (datetime.datetime.now(datetime.UTC) - written).total_seconds()


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


def test_an_answer_that_breaks_off_is_no_refusal():
    """aiohttp says 400 of it, in what others wrap."""
    aiohttp = pytest.importorskip("aiohttp", reason="pip install s3fs")
    exceptions = pytest.importorskip("botocore.exceptions", reason="pip install s3fs")
    from aiohttp.http_exceptions import BadStatusLine, ContentLengthError

    cut = aiohttp.ClientPayloadError("Response payload is not completed")
    cut.__cause__ = ContentLengthError("Not enough data to satisfy content length header.")
    closed = exceptions.ConnectionClosedError(endpoint_url="http://host", error=BadStatusLine("SSH-2.0"))
    for error in (cut, closed, exceptions.ResponseStreamingError(error=cut)):
        assert not _refused(error) and not set(_codes(error)) & {"400"}
    asks = aiohttp.ClientHttpProxyError(None, (), status=407)
    assert "407" in _codes(exceptions.ProxyConnectionError(proxy_url="http://proxy", error=asks))


def test_what_a_store_refuses_it_refuses_again_but_for_what_was_lost_on_the_way():
    def answer(status, code):
        return failed("no", response={"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}})

    refused = [(400, "400"), (400, "ExpiredToken"), (400, "AuthorizationHeaderMalformed"), (403, "QuotaExceeded"),
               (501, "NotImplemented")]  # fmt: skip
    passing = [(400, "RequestTimeout"), (400, "BadDigest"), (409, "OperationAborted"), (429, "TooManyRequests"),
               (500, "InternalError"), (503, "SlowDown")]  # fmt: skip
    assert all(_refused(answer(*one)) for one in refused) and not any(_refused(answer(*one)) for one in passing)


def test_a_name_in_an_object_store_is_shown_whole_and_what_opens_it_is_not():
    for name in ("s3://bucket/try#2/out", "gs://bucket/why?/out", "s3://bucket/a?b/day=1/000000.tar"):
        assert without_secrets(f"read {name} twice") == f"read {name} twice"
    assert without_secrets("s3://KEY:SECRET@bucket/a#1?X-Amz-Signature=SECRET&b=/c") == "s3://bucket/a#1"
    assert without_secrets("'https://ann:SECRET@host/a?b=SECRET#c' failed") == "'https://host/a' failed"
