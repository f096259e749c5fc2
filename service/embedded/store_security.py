"""Protect the S3 server's internal ports with keys, which each start creates anew.

SeaweedFS is six servers in one process. Each listens on its own port and on a socket in `/tmp`. Without this file a
client of one of these ports could read, write and delete every object without a key. With it, gRPC accepts only clients
with queryd's certificate, and the volume server's HTTP only requests with a valid token. `-disableHttp` turns off the
HTTP ports of master and filer.
"""

import datetime
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.embedded.private_files import write_private

_FILE = "security.toml"
# The server rereads this file while it runs. Its paths are relative to the server's working directory.
_IDENTITY = "identity.pem"
# Longer than any server runs without a restart; each start creates a new certificate.
_VALID = datetime.timedelta(days=3650)
# The clock may step back a little after the certificate was created.
_BACKDATED = datetime.timedelta(days=1)
_SIGNED = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
_PARTS = ("master", "volume", "filer", "s3", "admin", "worker", "client")


def write_security(directory: Path) -> None:
    """Write new keys and the configuration that uses them into the server's working directory, for its owner only."""
    write_private(directory / _IDENTITY, _make_identity())
    lines = [f'[{name}]\nkey = "{secrets.token_hex(32)}"' for name in _SIGNED]
    lines.append(f'[grpc]\nca = "{_IDENTITY}"')
    lines += [f'[grpc.{part}]\ncert = "{_IDENTITY}"\nkey = "{_IDENTITY}"' for part in _PARTS]
    write_private(directory / _FILE, "\n".join([*lines, ""]))


def _make_identity() -> str:
    """Create a private key and a self-signed certificate; client and server are one process, so both use them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "queryd embedded S3")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (secret + certificate.public_bytes(serialization.Encoding.PEM)).decode()
