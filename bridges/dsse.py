"""DSSE envelopes (secure-systems-lab/dsse, v1.0) signed with Ed25519, and the keys for them.

Nothing of a payload is read before its signature holds. `cryptography` is an optional extra, imported when a
key is used.
"""

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any

from bridges.report_file import parse_strict
from extractor.errors import InputError, MachineError

MAX_BYTES = 64 * 2**20  # of an envelope


def make_envelope(payload_type: str, payload: bytes, private_key: Path) -> dict[str, Any]:
    """The signed payload, as JSON-able values.

    Raises:
        InputError: no Ed25519 private key in PEM.
        MachineError: the package `cryptography` is missing.
    """
    private = _load_key(private_key, private=True)
    signature = private.sign(pre_authentication_encoding(payload_type, payload))
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": _key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def open_envelope(path: Path, payload_type: str) -> tuple[bytes, list[bytes]]:
    """Payload and signatures, not trusted yet. Raises ValueError for what is no such envelope."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    values = parse_strict(path.read_bytes().decode("utf-8"))
    if not isinstance(values, dict) or values.get("payloadType") != payload_type:
        raise ValueError(f"not a DSSE envelope of payload type {payload_type}")
    listed = values.get("signatures")
    if not isinstance(listed, list) or not listed or not all(isinstance(s, dict) for s in listed):
        raise ValueError("it has no list of signatures")
    return _decode(values.get("payload")), [_decode(signature.get("sig")) for signature in listed]


def is_signed(payload_type: str, payload: bytes, signatures: list[bytes], public_key: Path) -> bool:
    """Whether one of the signatures is this key's.

    Raises:
        InputError: no Ed25519 public key in PEM.
        MachineError: the package `cryptography` is missing.
    """
    public = _load_key(public_key, private=False)
    from cryptography.exceptions import InvalidSignature

    for signature in signatures:
        try:
            public.verify(signature, pre_authentication_encoding(payload_type, payload))
        except InvalidSignature:
            continue
        return True
    return False


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What DSSE signs: `DSSEv1 LEN(type) type LEN(payload) payload`, so that no byte can change its role."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _decode(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("payload or signature is not text")
    standard = text.translate({ord("-"): "+", ord("_"): "/"})  # DSSE allows both alphabets
    try:
        content = base64.b64decode(standard, validate=True)
    except binascii.Error as error:
        raise ValueError(f"payload or signature is not base64 ({error})") from None
    if base64.b64encode(content).decode() != standard:  # spare bits that a decoder drops
        raise ValueError("payload or signature is not base64 as it is written")
    return content


# --- keys ------------------------------------------------------------------------------------------------


def new_key(path: Path) -> Path:
    """Make an Ed25519 key pair: `path` (private, for its owner alone) and `path`.pub; returns the latter.

    Raises:
        InputError: one of the files is there already, or cannot be written.
        MachineError: the package `cryptography` is missing.
    """
    ed25519, serialization = _cryptography()
    private = ed25519.Ed25519PrivateKey.generate()
    public = path.with_name(f"{path.name}.pub")
    parts = {
        path: private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        public: private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    }
    for file, content in parts.items():
        try:  # never over a key that is there
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if file == path else 0o644)
        except OSError as error:
            raise InputError(f"key '{file}' cannot be made ({error.strerror})") from None
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
    return public


def _key_id(public: Any) -> str:
    """SHA-256 of a public key in DER: a hint for the reader, as in DSSE."""
    _, serialization = _cryptography()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _load_key(path: Path, *, private: bool) -> Any:
    ed25519, serialization = _cryptography()
    kind = "private" if private else "public"
    wanted = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    try:
        content = path.read_bytes()
        key = (
            serialization.load_pem_private_key(content, password=None)
            if private
            else serialization.load_pem_public_key(content)
        )
    except OSError as error:
        raise InputError(f"{kind} key '{path}' cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged, encrypted or unknown key: what this raises is not documented
        raise InputError(
            f"'{path}' is no {kind} key in PEM without a password ({' '.join(str(error).split())[:120]})"
        ) from None
    if not isinstance(key, wanted):
        raise InputError(f"'{path}' is not an Ed25519 key; make one with sparsebridge sign --new_key")
    return key


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MachineError("signatures need cryptography: pip install 'sparsebridge[sign]'") from None
    return ed25519, serialization
