"""Certificates, keys and kubeconfigs of a test cluster, for the control plane; all end with the state folder."""

import base64
import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE = datetime.timedelta(days=30)
CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Files below `folder`: the authority `ca`, the server `apiserver`, the key of tokens `service-accounts`."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def make(self, names: list[str], addresses: list[str]) -> None:
        """All that the API server needs, valid under these names and addresses."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ca_key = ec.generate_private_key(ec.SECP256R1())
        subject = name_of("moeserving-test-ca")
        ca = build(subject, subject, ca_key, ca_key, authority=True).sign(ca_key, hashes.SHA256())
        self._write("ca", ca, ca_key)
        hosts: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        hosts += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        self._issue("apiserver", name_of("kube-apiserver"), ExtendedKeyUsageOID.SERVER_AUTH, hosts)
        signing = ec.generate_private_key(ec.SECP256R1())
        self.path("service-accounts.key").write_bytes(pem_of(signing))
        self.path("service-accounts.pub").write_bytes(
            signing.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def issue_user(self, user: str, groups: list[str]) -> None:
        """A client certificate that the API server takes for this user, `user-NAME.crt` and `.key`."""
        self._issue(f"user-{user}", name_of(user, groups), ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def _issue(self, stem: str, subject: x509.Name, use: x509.ObjectIdentifier, hosts: list[x509.GeneralName]) -> None:
        ca = x509.load_pem_x509_certificate(self.path("ca.crt").read_bytes())
        ca_key = serialization.load_pem_private_key(self.path("ca.key").read_bytes(), password=None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        made = build(subject, ca.subject, key, ca_key, authority=False)
        made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if hosts:
            made = made.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        self._write(stem, made.sign(ca_key, hashes.SHA256()), key)

    def _write(self, stem: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.path(f"{stem}.key").touch(mode=0o600)
        self.path(f"{stem}.key").write_bytes(pem_of(key))
        self.path(f"{stem}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def build(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    authority: bool,
) -> x509.CertificateBuilder:
    """With the extensions that a strict client (Python 3.13) asks for."""
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFE)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )


def name_of(user: str, groups: list[str] | None = None) -> x509.Name:
    """Kubernetes reads the user from the common name and its groups from the organisations."""
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
    parts += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups or []]
    return x509.Name(parts)


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_kubeconfig(path: Path, server: str, certificates: Certificates, user: dict[str, str]) -> Path:
    """A kubeconfig that stands alone: the authority is inside."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "test",
                "cluster": {"server": server, "certificate-authority-data": encoded(certificates.path("ca.crt"))},
            }
        ],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document))
    return path


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
