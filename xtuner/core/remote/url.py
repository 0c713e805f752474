"""`s3://bucket/key` and `oss://bucket/key`: what they mean, and with which endpoint and credentials they are read.

    s3    AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN;
          else the profile AWS_PROFILE of ~/.aws/credentials; else the role of the machine
    oss   OSS_ENDPOINT or OSS_REGION, OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET, OSS_SESSION_TOKEN

OSS is accessed by its S3 protocol. Credentials are never part of an address: it is logged, and kept in checkpoints.
"""

import configparser
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xtuner.core import secrets
from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import short_repr

SCHEMES = ("s3", "oss")
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}")
_ROLES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")


def is_remote(name: object) -> bool:
    """Whether a text is an address in object storage, valid or not."""
    return isinstance(name, str) and name.partition("://")[0] in SCHEMES and "://" in name


@dataclass(frozen=True)
class Url:
    scheme: str
    bucket: str
    key: str  # without slashes at its ends; empty for the bucket itself

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    def join(self, name: str) -> "Url":
        return Url(self.scheme, self.bucket, f"{self.key}/{name}".strip("/"))


def parse_url(text: str, where: str = "") -> Url:
    """Raises: ConfigError for anything else than SCHEME://BUCKET or SCHEME://BUCKET/KEY."""
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if "@" in rest and ":" in rest.rpartition("@")[0]:
        raise ConfigError(
            f"{scheme}://***@{rest.rpartition('@')[2]} contains credentials",
            where=where,
            why="addresses are logged, and kept with checkpoints",
            do=f"set {_variables(scheme)} in the environment instead, and replace these credentials",
        )
    parts = key.strip("/").split("/")
    if scheme not in SCHEMES or not _BUCKET.fullmatch(bucket) or (parts != [""] and {"", ".", ".."} & {*parts}):
        raise ConfigError(
            f"{short_repr(text)} is not an address in object storage", where=where, do="as s3://bucket/folder"
        )
    return Url(scheme, bucket, "/".join(parts))


def _variables(scheme: str) -> str:
    if scheme == "oss":
        return "OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET"
    return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def advise_on_credentials(scheme: str) -> str:
    profile = " (or a profile in ~/.aws/credentials)" if scheme == "s3" else ""
    return f"check {_variables(scheme)}{profile}, and what they are permitted to do"


def advise_on_endpoint(scheme: str) -> str:
    names = "OSS_ENDPOINT or OSS_REGION" if scheme == "oss" else "AWS_ENDPOINT_URL and AWS_REGION"
    return f"check {names}, and the network of this machine"


def find_credentials(scheme: str, env: Mapping[str, str] = os.environ) -> dict[str, str | None] | None:
    """Access key, secret and token; None to use the role of the machine. Raises: ConfigError."""
    prefix, secret = ("OSS", "OSS_ACCESS_KEY_SECRET") if scheme == "oss" else ("AWS", "AWS_SECRET_ACCESS_KEY")
    found = env.get(f"{prefix}_ACCESS_KEY_ID"), env.get(secret), env.get(f"{prefix}_SESSION_TOKEN")
    if bool(found[0]) != bool(found[1]):
        raise ConfigError(
            f"of {_variables(scheme)}, only one is set", do="set both, or neither to use those of another source"
        )
    if scheme == "s3" and not found[0] and not any(env.get(name) for name in _ROLES):
        found = _read_profile(env)
    if found[0] and found[1]:
        secrets.learn({"secret": [v for v in found if v]})
        return {"access_key_id": found[0], "secret_access_key": found[1], "token": found[2] or None}
    if scheme == "oss":
        raise ConfigError("there are no credentials for oss://", do=f"set {_variables(scheme)}")
    return None


def _read_profile(env: Mapping[str, str]) -> tuple[str | None, str | None, str | None]:
    path = Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    name = env.get("AWS_PROFILE") or "default"
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        raise ConfigError("the file of credentials cannot be read", where=str(path)) from None  # no line of it is shown
    if not parser.has_section(name):
        if env.get("AWS_PROFILE"):
            raise ConfigError(f"there is no profile {name!r}", where=str(path), do="check AWS_PROFILE")
        return None, None, None
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return tuple(parser.get(name, key, fallback=None) for key in names)  # type: ignore[return-value]


def store_options(url: Url, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Endpoint and region of a bucket, as arguments of obstore's S3Store. Raises: ConfigError."""
    if url.scheme == "oss":
        region = env.get("OSS_REGION", "").removeprefix("oss-")
        endpoint = env.get("OSS_ENDPOINT") or (f"https://oss-{region}.aliyuncs.com" if region else "")
        if not endpoint:
            raise ConfigError(
                "the endpoint of oss:// is not known", where=str(url), do="set OSS_ENDPOINT or OSS_REGION"
            )
        endpoint = _require_endpoint(endpoint, "OSS_ENDPOINT")
        at = urlsplit(endpoint)
        region = region or at.netloc.partition(".")[0].removeprefix("oss-")
        by_name = bool(re.search(r"\.aliyuncs\.com$", at.hostname or ""))  # which takes the bucket in the host only
        if by_name and not at.netloc.startswith(f"{url.bucket}."):
            endpoint = f"{at.scheme}://{url.bucket}.{at.netloc}"
        return {"endpoint": endpoint, "region": f"oss-{region}", "virtual_hosted_style_request": by_name}
    found: dict[str, Any] = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if env.get(name):
            return {**found, "endpoint": _require_endpoint(env[name], name)}
    return found


def _require_endpoint(text: str, name: str) -> str:
    text = (text if "://" in text else f"https://{text}").rstrip("/")
    at = urlsplit(text)
    if at.scheme not in ("http", "https") or not at.hostname or "@" in at.netloc:
        raise ConfigError(f"{name} is not the address of a server", where=name, do="as https://host:port")
    return text
