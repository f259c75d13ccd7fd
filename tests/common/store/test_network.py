"""Proxies and certificates as companies have them: what the environment names is used, and what fails is told."""

import datetime
import ipaddress
import ssl

import pytest
from faulty_server import FaultyServer

from cogcommon.errors import StoreError
from cogcommon.store import http_store
from cogcommon.store.fsspec_store import open_fsspec
from cogcommon.store.http_store import HttpStore
from cogcommon.store.store import Patience, StoredFile

NOBODY = "http://127.0.0.1:9"  # a port at which nobody answers
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    proxies = [name + "_proxy" for name in ("http", "https", "all", "no")]
    for name in [*proxies, *map(str.upper, proxies), *CERTIFICATES, "AWS_PROFILE"]:
        monkeypatch.delenv(name, raising=False)
    http_store._session.cache_clear()
    yield
    http_store._session.cache_clear()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    server = FaultyServer(tmp_path)
    yield server
    server.stop()


def read(url, patience=0):
    return bytes(StoredFile(HttpStore(), url, url).read_all(Patience(patience)).data)


def refused(url):
    with pytest.raises(StoreError) as caught:
        read(url)
    assert "pa55" not in str(caught.value)
    return caught.value


def use(monkeypatch, proxy):
    proxy = proxy.replace("http://", "http://ann:pa55@")
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)


def test_a_proxy_is_used_with_its_name_and_password_but_for_no_proxy(server, monkeypatch):
    seen = []
    server.begin(lambda handler: seen.append(handler.headers.get("Proxy-Authorization")))
    use(monkeypatch, server.url)
    assert read("http://elsewhere.invalid/file") == b"content" and seen == ["Basic YW5uOnBhNTU="]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert read(f"{server.url}/file") == b"content" and seen[1:] == [None]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_a_proxy_does_is_told_as_the_proxys(server, monkeypatch, scheme):
    url = f"{scheme}://elsewhere.invalid/file"
    use(monkeypatch, server.url)
    for status, says in ((407, "407 Proxy Authentication Required"), (403, "403 Forbidden"), (502, "502 Bad Gateway")):
        server.begin(lambda handler, status=status: handler.answer(status))
        told = refused(url)
        assert says in told.what and f"the proxy 127.0.0.1:{server.server_port}" in told.what
        assert status != 407 or "HTTPS_PROXY" in told.fix
    for proxy, says in (
        (NOBODY, "no connection to the proxy 127.0.0.1:9: Connection refused"),
        ("http://proxy:port", "the proxy proxy:port cannot be used"),
        ("socks9://127.0.0.1:9", "the proxy 127.0.0.1:9 cannot be used"),
    ):
        use(monkeypatch, proxy)
        told = refused(url)
        assert says in told.what and "HTTPS_PROXY" in told.fix


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate that nobody else has signed, with its key in the same file."""
    pytest.importorskip("cryptography", reason="pip install cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Company")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(1)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day, [])
    signed = builder.add_extension(here, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = tmp_path_factory.mktemp("tls") / "company.pem"
    file.write_bytes(signed.public_bytes(pem) + private)
    return file


@pytest.fixture
def secure(server, certificate):
    """The address of a server with a certificate of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server.url.replace("http://", "https://")


def test_certificates_that_the_environment_names_are_believed(secure, certificate, monkeypatch):
    told = refused(f"{secure}/file")
    assert "certificate verify failed" in told.what and "REQUESTS_CA_BUNDLE=FILE" in told.fix
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(certificate))
            http_store._session.cache_clear()
            assert read(f"{secure}/file") == b"content"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/company.pem")
    told = refused(f"{secure}/file")
    assert "invalid path: /nowhere/company.pem" in told.what and "REQUESTS_CA_BUNDLE=FILE" in told.fix


def test_what_a_bucket_needs_of_this_machine_is_told_at_once(secure, server, certificate, monkeypatch, tmp_path):
    """None of it gets better by waiting."""
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    config = tmp_path / "config"
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "EC2_METADATA_DISABLED"):
        monkeypatch.setenv(f"AWS_{name}", "true")
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(config))
    monkeypatch.setenv("AWS_ENDPOINT_URL", secure)

    def told(**environment):
        s3fs.S3FileSystem.clear_instance_cache()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, str(value))
            store, path = open_fsspec("s3://bucket/file", "--shards")
            with pytest.raises(StoreError) as caught:
                StoredFile(store, path, "s3://bucket/file").read_all(Patience(5))
        assert "attempts" not in caught.value.what and "pa55" not in str(caught.value)
        return caught.value

    config.write_text("[profile sso]\nsso_start_url=x\nsso_region=us-east-1\nsso_account_id=1\nsso_role_name=x\n")
    server.begin(lambda handler: handler.answer(418))
    proxy = FaultyServer(tmp_path)
    proxy.begin(lambda handler: handler.answer(407))
    assert "REQUESTS_CA_BUNDLE=FILE" in told().fix
    assert "REQUESTS_CA_BUNDLE=FILE" in told(REQUESTS_CA_BUNDLE="/nowhere/company.pem").fix
    assert "(418)" in told(REQUESTS_CA_BUNDLE=certificate).what  # it was asked
    refusing = told(HTTPS_PROXY=proxy.url.replace("http://", "http://ann:pa55@"))
    assert "(407)" in refusing.what and "HTTPS_PROXY" in refusing.fix
    assert "HTTPS_PROXY" in told(HTTPS_PROXY="bad:proxy:port").fix
    assert "credentials" in told(AWS_PROFILE="nobody").fix
    config.write_text("no configuration")
    assert "credentials" in told(AWS_PROFILE="nobody").fix
    proxy.stop()
    s3fs.S3FileSystem.clear_instance_cache()
