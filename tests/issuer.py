"""An issuer of JWTs on this machine: its keys, its key set, and tokens that are wrong in one way each."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

NAME, AUDIENCE = "https://id.example.org/", "pgshelf"
ALGORITHMS = {"RS256": "rsa", "ES256": "ec", "EdDSA": "ed"}


class Issuer:
    """Signs with three keys whose ids are rsa, ec and ed; a fourth, of id new, is not in the set yet."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {
            "rsa": rsa.generate_private_key(65537, 2048),
            "ec": ec.generate_private_key(ec.SECP256R1()),
            "ed": ed25519.Ed25519PrivateKey.generate(),
            "new": ed25519.Ed25519PrivateKey.generate(),
        }

    def key_set(self, *names: str) -> dict[str, Any]:
        """The public keys as a JWKS, with some that are not for pgshelf."""
        own = [self.jwk(name) for name in names or ("rsa", "ec", "ed")]
        strange = [{"kty": "oct", "kid": "oct", "k": "c2VjcmV0"}, {"kty": "RSA", "kid": "broken"}, {"kid": 7}, "text"]
        return {"keys": [*strange, {**self.jwk("rsa"), "kid": "for encryption", "use": "enc"}, *own]}

    def jwk(self, name: str) -> dict[str, Any]:
        kinds: dict[str, Any] = {"rsa": jwt.algorithms.RSAAlgorithm, "ec": jwt.algorithms.ECAlgorithm}
        made = kinds.get(name, jwt.algorithms.OKPAlgorithm).to_jwk(self.keys[name].public_key(), as_dict=True)
        return {**made, "kid": name}

    def pem(self, name: str) -> bytes:
        """A public key as a PEM file."""
        found: bytes = self.keys[name].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return found

    def settings(self, folder: Path) -> dict[str, Any]:
        """The settings that trust it, by a file."""
        file = folder / "keys.json"
        file.write_text(json.dumps(self.key_set()))
        return {"jwt_issuer": NAME, "jwt_audience": AUDIENCE, "jwt_keys_file": file}

    def token(
        self, role: Any = "reader", libraries: Any = "*", *, key: str = "ed", alg: str | None = None,
        header: dict[str, Any] | None = None, without: str = "", **claims: Any,
    ) -> str:  # fmt: skip
        """A token; with None for a claim, without it."""
        known = {"iss": NAME, "aud": AUDIENCE, "sub": "ann", "exp": time.time() + 60}
        known |= {"pgshelf_role": role, "pgshelf_libraries": libraries, **claims}
        payload = {name: value for name, value in known.items() if value is not None and name != without}
        alg = alg or {kid: name for name, kid in ALGORITHMS.items()}.get(key, "EdDSA")
        return jwt.encode(payload, self.keys[key], alg, {"kid": key, **(header or {})})

    def signed(self, header: dict[str, Any], payload: str) -> str:
        """A token that no library would make, signed as it should be."""
        content = f"{part(header)}.{payload}"
        made = self.keys["ed"].sign(content.encode())
        return f"{content}.{base64.urlsafe_b64encode(made).decode().rstrip('=')}"

    def wrong(self) -> dict[str, str]:
        """Tokens of an admin for all libraries, but for one thing."""
        good = self.token("admin")
        head, payload, signature = good.split(".")
        claims = json.loads(unpart(payload))
        forged = part({**claims, "sub": "eve"})
        return {
            "none": f"{part({'alg': 'none', 'kid': 'ed'})}.{payload}.",
            "None": f"{part({'alg': 'None', 'kid': 'ed'})}.{payload}.{signature}",
            "no algorithm": f"{part({'kid': 'ed'})}.{payload}.{signature}",
            "algorithm confused": hs256(payload, "rsa", self.pem("rsa")),
            "symmetric key of the set": hs256(payload, "oct", b"secret"),
            "another algorithm of the same key": self.token("admin", key="rsa", alg="PS256"),
            "another key's id": self.token("admin", header={"kid": "ec"}),
            "a key for encryption": self.token("admin", key="rsa", header={"kid": "for encryption"}),
            "unknown key": self.token("admin", key="new"),
            "no key": self.signed({"alg": "EdDSA"}, payload),
            "key id is a number": self.signed({"alg": "EdDSA", "kid": 7}, payload),
            "signature of another": f"{head}.{payload}.{self.token('admin', key='new').split('.')[2]}",
            "signature cut": f"{head}.{payload}.{signature[:-8]}",
            "no signature": f"{head}.{payload}.",
            "claims changed": f"{head}.{forged}.{signature}",
            "expired": self.token("admin", exp=time.time() - 60),
            "no end": self.token("admin", without="exp"),
            "end is no number": self.signed({"alg": "EdDSA", "kid": "ed"}, part({**claims, "exp": "never"})),
            "not yet": self.token("admin", nbf=time.time() + 120),
            "another issuer": self.token("admin", iss="https://id.example.com/"),
            "no issuer": self.token("admin", without="iss"),
            "another audience": self.token("admin", aud=["other", "another"]),
            "no audience": self.token("admin", without="aud"),
            "no subject": self.token("admin", without="sub"),
            "empty subject": self.token("admin", sub=""),
            "subject is a number": self.signed({"alg": "EdDSA", "kid": "ed"}, part({**claims, "sub": 7})),
            "subject that cannot be stored": self.token("admin", sub="ann\0"),
            "extension that must be understood": self.signed(
                {"alg": "EdDSA", "kid": "ed", "crit": ["x"], "x": 1}, payload
            ),
            "libraries are a number": self.token("admin", 7),
            "libraries are numbers": self.token("admin", [7]),
            "too long": self.token("admin", padding="x" * 9000),
            "not JSON": f"{head}.bm90IEpTT04.{signature}",
            "three dots": "a.b.c",
        }


def hs256(payload: str, kid: str, key: bytes) -> str:
    head = part({"alg": "HS256", "typ": "JWT", "kid": kid})
    made = hmac.new(key, f"{head}.{payload}".encode(), hashlib.sha256).digest()
    return f"{head}.{payload}.{base64.urlsafe_b64encode(made).decode().rstrip('=')}"


def part(content: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def unpart(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
