"""Signed statements: in-toto Statement v1 in a DSSE envelope, Ed25519.

Formats: https://github.com/in-toto/attestation/tree/main/spec/v1 and
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirepro import files
from mirepro.audit import safe
from mirepro.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD = "application/vnd.in-toto+json"
AUDIT = "https://in-toto.io/attestation/test-result/v0.1"
RELEASE = "https://in-toto.io/attestation/release/v0.1"
KEY_BYTES = 10_000
ABSENT = "is not there"


def new_keys(path: Path) -> str:
    """Writes a private key (mode 600) and beside it `<path>.pub`; returns the key's id.

    Raises:
        UserError: One of the files exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(path.name + ".pub")
    for one in (path, public):
        if one.exists():
            raise UserError(f"{one}: exists; keys are never overwritten, choose another name")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise files.refusal(path, error) from error
    files.write_bytes(public, public_pem(key.public_key()))
    return key_id(key.public_key())


def public_pem(key: "Ed25519PublicKey") -> bytes:
    """The public key as the text that `--key` reads."""
    from cryptography.hazmat.primitives import serialization as form

    return key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)


def key_id(key: "Ed25519PublicKey") -> str:
    """sha256 of the public key's PEM text."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def private_key(path: Path) -> "Ed25519PrivateKey":
    """Reads a private key.

    Raises:
        UserError: Missing, encrypted, or no Ed25519 private key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(safe.regular(path, KEY_BYTES), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path}: not a private key without password; `mirepro keys new {path}` makes one") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path}: not an Ed25519 key; `mirepro keys new FILE` makes one")
    return key


def public_key(path: Path) -> "Ed25519PublicKey":
    """Reads a public key.

    Raises:
        UserError: Missing, or no Ed25519 public key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(safe.regular(path, KEY_BYTES))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path}: not a public key; it is the file that ends in .pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path}: not an Ed25519 public key")
    return key


def subject(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """in-toto subjects of files: name and sha256."""
    return [{"name": name, "digest": {"sha256": files.sha256(folder / name)}} for name in names]


def make(subjects: Sequence[Mapping[str, Any]], kind: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto Statement."""
    return {"_type": STATEMENT, "subject": list(subjects), "predicateType": kind, "predicate": dict(predicate)}


def pae(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(body), body)


def envelope(statement: Mapping[str, Any], key: "Ed25519PrivateKey | None") -> dict[str, Any]:
    """The DSSE envelope; without a key it has no signature and says nothing about its origin."""
    body = files.dump_json(statement).encode()
    signatures = []
    if key is not None:
        text = base64.b64encode(key.sign(pae(PAYLOAD, body))).decode()
        signatures.append({"keyid": key_id(key.public_key()), "sig": text})
    return {"payloadType": PAYLOAD, "payload": base64.b64encode(body).decode(), "signatures": signatures}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(envelope, statement) of a file, its form checked, its signature not.

    Raises:
        UserError: It is not an in-toto Statement in a DSSE envelope.
    """
    outer = safe.read_json(path)
    try:
        if outer["payloadType"] != PAYLOAD or not isinstance(outer["signatures"], list):
            raise KeyError("payloadType")
        inner = safe.parse_json(base64.b64decode(outer["payload"], validate=True), str(path))
        good = inner["_type"] == STATEMENT and isinstance(inner["predicate"], dict)
        good = good and isinstance(inner["predicateType"], str)
        named = {item["name"]: item["digest"]["sha256"] for item in inner["subject"]}
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"{path}: not an in-toto statement in a DSSE envelope ({error})") from error
    if not good or len(named) != len(inner["subject"]):
        raise UserError(f"{path}: not an in-toto Statement v1")
    return outer, inner


def signed_by(outer: Mapping[str, Any], key: "Ed25519PublicKey") -> bool:
    """Whether the envelope has a valid signature of the key."""
    from cryptography.exceptions import InvalidSignature

    body = base64.b64decode(outer["payload"], validate=True)
    for item in outer["signatures"]:
        try:
            key.verify(base64.b64decode(item["sig"], validate=True), pae(PAYLOAD, body))
            return True
        except (InvalidSignature, KeyError, TypeError, ValueError):
            continue
    return False


def differing(statement: Mapping[str, Any], folder: Path) -> list[str]:
    """Subjects whose file in `folder` is missing or has another sha256.

    Raises:
        UserError: A name leaves the folder.
    """
    wrong = []
    for item in statement["subject"]:
        path = folder / safe.inside(item["name"], "statement")
        if path.is_symlink() or not path.is_file():
            wrong.append(f"{item['name']}: {ABSENT}")
        elif files.sha256(path) != item["digest"]["sha256"]:
            wrong.append(f"{item['name']}: has another sha256")
    return wrong
