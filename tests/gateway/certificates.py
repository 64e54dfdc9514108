"""Certificates of a test's own authorities, in folders as a mounted Secret has them."""

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cluster_certificates import build, name_of, pem_of
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True, slots=True)
class Authority:
    """An authority that signs certificates."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return _pem(self.certificate)

    def issue(self, folder: Path, common_name: str = "gateway") -> Path:
        """Writes `tls.crt`, `tls.key` and `ca.crt` into a folder."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        made = build(name_of(common_name), self.name, key, self.key, authority=False)
        folder.mkdir(exist_ok=True)
        (folder / "tls.key").write_bytes(pem_of(key))
        (folder / "tls.crt").write_bytes(
            _pem(made.add_extension(names, critical=False).sign(self.key, hashes.SHA256()))
        )
        (folder / "ca.crt").write_bytes(self.pem)
        return folder


def make_authority(name: str = "authority") -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = name_of(name)
    return Authority(subject, key, build(subject, subject, key, key, authority=True).sign(key, hashes.SHA256()))


def private_pem(key: ec.EllipticCurvePrivateKey, password: bytes) -> bytes:
    encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
