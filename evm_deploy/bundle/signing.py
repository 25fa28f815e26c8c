"""Signed bundles: ed25519 (RFC 8032) over the bytes of manifest.json, which holds the hash of every other file.

The signature, 64 bytes, is `manifest.json.sig`. OpenSSL makes and checks the same:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out public.pem
    openssl pkeyutl -sign -inkey key.pem -rawin -in manifest.json -out manifest.json.sig
    openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile manifest.json.sig
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import write_atomically
from evm_deploy.bundle.manifest import FILE
from evm_deploy.errors import BundleError, ToolchainError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = f"{FILE}.sig"
MAX_BYTES = 1 << 16  # of a key's file
MAKE_HINT = "make one:  openssl genpkey -algorithm ed25519 -out key.pem"
PUBLIC_HINT = "from the private key:  openssl pkey -in key.pem -pubout -out public.pem"


def private_key(path: str | Path) -> Ed25519PrivateKey:
    """The key in a PEM file. Raises UsageError, ToolchainError."""
    serialization, ed25519 = _cryptography()
    load = partial(serialization.load_pem_private_key, password=None)
    key: Ed25519PrivateKey = _key(path, load, ed25519.Ed25519PrivateKey, MAKE_HINT)
    return key


def public_key(path: str | Path) -> Ed25519PublicKey:
    """The key in a PEM file. Raises UsageError, ToolchainError."""
    serialization, ed25519 = _cryptography()
    key: Ed25519PublicKey = _key(path, serialization.load_pem_public_key, ed25519.Ed25519PublicKey, PUBLIC_HINT)
    return key


def sign(bundle: Path, key: Ed25519PrivateKey) -> None:
    """Write the signature of the bundle in the folder `bundle`. Raises BundleError."""
    try:
        write_atomically(bundle / SIGNATURE, key.sign((bundle / FILE).read_bytes()))
    except OSError as error:
        raise BundleError(f"bundle {bundle} cannot be signed: {error.strerror}") from error


def check(key: Ed25519PublicKey, bundle: Path, manifest: bytes) -> None:
    """Raise BundleError unless `key` signed these bytes of the manifest in the folder `bundle`."""
    from cryptography.exceptions import InvalidSignature

    try:
        signature = (bundle / SIGNATURE).read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"bundle {bundle} is not signed", "evm-export --sign signs") from error
    except OSError as error:
        raise BundleError(f"{bundle / SIGNATURE} cannot be read: {error.strerror}") from error
    try:
        key.verify(signature, manifest)
    except InvalidSignature as error:
        raise BundleError(
            f"bundle {bundle} was changed after it was signed, or signed with another key", "do not use it"
        ) from error


def check_nothing_else(bundle: Path, listed: set[str]) -> None:
    """Raise BundleError for a file that the manifest, and so the signature, knows nothing of."""
    for file in sorted(bundle.rglob("*")):
        name = file.relative_to(bundle).as_posix()
        if not file.is_dir() and name not in listed | {FILE, SIGNATURE}:
            raise BundleError(f"bundle {bundle}: {name} is not in its manifest, and so not signed", "remove it")
        if file.is_symlink():
            raise BundleError(f"bundle {bundle}: {name} is a link", "a signed bundle has files alone")


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ToolchainError("cryptography is not installed", "pip install 'evm-deploy[sign]'") from error
    return serialization, ed25519


def _key(path: str | Path, load: Any, kind: type[Any], hint: str) -> Any:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise UsageError(f"key {path} cannot be read: {error.strerror}", hint) from error
    try:
        key = load(data)
    except TypeError as error:  # what cryptography raises for a missing password
        raise UsageError(
            f"key {path} is encrypted", "remove the password:  openssl pkey -in KEY -out key.pem"
        ) from error
    except Exception as error:  # an untrusted file: whatever is wrong in it, it is no key
        raise UsageError(f"{path} is not a PEM file of such a key", hint) from error
    if not isinstance(key, kind):
        raise UsageError(f"key {path} is no ed25519 key", hint)
    return key
