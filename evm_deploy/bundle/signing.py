"""Sign bundles, and verify signatures: ed25519 (RFC 8032) over manifest.json, which has the hash of every other file.

The file `manifest.json.sig` holds the signature, 64 bytes. The same with OpenSSL:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out public.pem
    openssl pkeyutl -sign -inkey key.pem -rawin -in manifest.json -out manifest.json.sig
    openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile manifest.json.sig
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import require_regular, write_atomically
from evm_deploy._util.packages import install_hint
from evm_deploy.bundle.manifest import FILE
from evm_deploy.errors import BundleError, ToolchainError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = f"{FILE}.sig"
MAX_BYTES = 1 << 16  # largest size of a key file
MAKE_HINT = "create a key:  openssl genpkey -algorithm ed25519 -out key.pem"
PUBLIC_HINT = "create it from the private key:  openssl pkey -in key.pem -pubout -out public.pem"


def private_key(path: str | Path) -> Ed25519PrivateKey:
    """Read an ed25519 private key from a PEM file. Raises UsageError, ToolchainError."""
    serialization, ed25519 = _cryptography()
    load = partial(serialization.load_pem_private_key, password=None)
    key: Ed25519PrivateKey = _key(path, load, ed25519.Ed25519PrivateKey, "private", MAKE_HINT)
    return key


def public_key(path: str | Path) -> Ed25519PublicKey:
    """Read an ed25519 public key from a PEM file. Raises UsageError, ToolchainError."""
    serialization, ed25519 = _cryptography()
    load = serialization.load_pem_public_key
    key: Ed25519PublicKey = _key(path, load, ed25519.Ed25519PublicKey, "public", PUBLIC_HINT)
    return key


def sign(bundle: Path, key: Ed25519PrivateKey) -> None:
    """Sign the bundle in the folder `bundle`: write manifest.json.sig. Raises BundleError."""
    try:
        write_atomically(bundle / SIGNATURE, key.sign((bundle / FILE).read_bytes()))
    except OSError as error:
        raise BundleError(f"bundle {bundle} cannot be signed: {error.strerror}") from error


def check(key: Ed25519PublicKey, bundle: Path, manifest: bytes) -> None:
    """Verify the signature of the bundle in the folder `bundle`. `manifest`: the bytes of manifest.json.

    Raises BundleError if the signature is missing, or was not made with the private key of `key`.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        require_regular(bundle / SIGNATURE)
        with (bundle / SIGNATURE).open("rb") as file:
            signature = file.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise BundleError(f"bundle {bundle} is not signed", "sign it with evm-export --sign") from error
    except OSError as error:
        raise BundleError(f"{bundle / SIGNATURE} cannot be read: {error.strerror}") from error
    try:
        key.verify(signature, manifest)
    except InvalidSignature as error:
        raise BundleError(
            f"bundle {bundle} was changed after signing, or was signed with another key", "do not use the bundle"
        ) from error


def check_nothing_else(bundle: Path, listed: set[str]) -> None:
    """Raise BundleError if the bundle contains a link, or a file that is not in the manifest and thus not signed."""
    for file in sorted(bundle.rglob("*")):
        name = file.relative_to(bundle).as_posix()
        if file.is_symlink():
            raise BundleError(f"bundle {bundle}: {name} is a link", "use regular files in signed bundles")
        if not file.is_dir() and name not in listed | {FILE, SIGNATURE}:
            raise BundleError(f"bundle {bundle}: {name} is not in the manifest, and thus not signed", "remove the file")


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ToolchainError("cryptography is not installed", install_hint("sign")) from error
    return serialization, ed25519


def _key(path: str | Path, load: Any, kind: type[Any], which: str, hint: str) -> Any:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise UsageError(f"key {path} cannot be read: {error.strerror}", hint) from error
    try:
        key = load(data)
    except TypeError as error:  # cryptography raises TypeError if the password is missing
        raise UsageError(
            f"key {path} is encrypted", "remove the password:  openssl pkey -in KEY -out key.pem"
        ) from error
    except Exception as error:  # untrusted file: every error means that the file holds no key
        raise UsageError(f"{path} is not a PEM file of an ed25519 {which} key", hint) from error
    if not isinstance(key, kind):
        raise UsageError(f"key {path} is not an ed25519 key", hint)
    return key
