"""Reads the kubeconfig, or the credentials of this pod, into the settings of a connection.

The client quotes complete user entries in some messages, logs a plugin's failure instead of
raising, and notices other mistakes only in a request; so the files are checked here first.
"""

import base64
import binascii
import logging
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import shorten
from zephyr_ray.masking import is_secret, masked, remember

if TYPE_CHECKING:
    from kubernetes.client import Configuration

NAMESPACE_OF_THIS_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SCHEMES = ("http", "https")
SECRET_FILES = {
    "tokenFile": "token",
    "client-key": "client-key-data",
    "client-certificate": "client-certificate-data",
}
"""User settings that are file paths, each with the setting that holds the content itself."""
PROXY_SCHEMES = (*SCHEMES, "socks4", "socks4a", "socks5", "socks5h")


def configure(configuration: "Configuration", context: str | None) -> str:
    """Fills in server and credentials; returns the context's namespace, or this pod's.

    Raises Permanent with one line if they cannot be used.
    """
    from kubernetes import config

    # The client reads KUBECONFIG only once, at import.
    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    paths = [Path(f).expanduser() for f in files.split(os.pathsep) if f]
    paths = [path for path in paths if path.exists()]
    try:
        if not paths and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(configuration)
            return NAMESPACE_OF_THIS_POD.read_text().strip()
        contents = [_read(path) for path in paths]
        chosen, namespace = _choose(contents, context) if contents else (context, "default")
        _check_secret_files(paths, contents, chosen)
        with _plugin_errors() as errors:
            config.load_kube_config(files, chosen, configuration)
    except Permanent:
        raise
    except Exception as error:  # a malformed file can make the client raise anything
        raise Permanent(
            f"no Kubernetes cluster is configured ({one_line(error)}); set KUBECONFIG, or context "
            "in the profile"
        ) from None
    if errors:
        raise Permanent(
            f"the kubeconfig's exec plugin failed ({errors[0]}); install or correct it, or log in"
        )
    _check_address("the kubeconfig's server", configuration.host, SCHEMES)
    if configuration.proxy:
        _check_address("the proxy to the cluster", configuration.proxy, PROXY_SCHEMES)
    _check_certificates(configuration)
    return namespace


def one_line(error: object) -> str:
    """Returns the error's text on one line, without the parts of a kubeconfig that it quotes."""
    return shorten(re.sub(r"\{.*\}", "…", masked(error), flags=re.DOTALL), 200)


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of one file and remembers its secrets."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Permanent(
            f"cannot read the kubeconfig {path}: {error.strerror}; correct KUBECONFIG or its mode"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        # The parser's own message may quote a token.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise Permanent(f"the kubeconfig {path}{line} is not valid YAML; correct it") from None
    if not isinstance(content, dict):
        raise Permanent(f"the kubeconfig {path} is not a mapping; write or download it again")
    _remember_secrets(content.get("users"))
    for kind in ("clusters", "users"):
        _check_base64(content.get(kind), path)
    return content


def _remember_secrets(node: Any, name: str = "") -> None:
    """Masks each text whose name marks it as secret: the name is its key, such as `token`, its
    plugin variable, or the flag before it, such as `--client-secret`."""
    if isinstance(node, dict):
        for key, value in node.items():
            _remember_secrets(
                value, str(node["name"] if key == "value" and "name" in node else key)
            )
    elif isinstance(node, list):
        for before, value in zip(["", *node], node, strict=False):
            flag = before if isinstance(before, str) and before.startswith("-") else name
            _remember_secrets(value, flag)
    elif isinstance(node, str) and is_secret(name):
        remember(node)


def _check_base64(node: Any, path: Path, name: str = "") -> None:
    """Raises Permanent if the content of a certificate or key is not base64."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _check_base64(value, path, str(key))
    elif isinstance(node, str) and name.endswith("-data"):
        try:
            base64.b64decode("".join(node.split()), validate=True)
        except (binascii.Error, ValueError):
            raise Permanent(
                f"the kubeconfig {path}: {name} is not base64; encode the file, or give its path "
                f"in {name.removesuffix('-data')}"
            ) from None


def _choose(contents: list[dict[str, Any]], context: str | None) -> tuple[str, str]:
    """Returns the context to use and its namespace. As in kubectl, the first of the files
    wins if several name a current context or repeat a name."""
    contexts: dict[str, Any] = {}
    for content in contents:
        for entry in content.get("contexts") or []:
            contexts.setdefault(entry["name"], entry["context"])
    current = [c["current-context"] for c in contents if c.get("current-context")]
    chosen = context or (current[0] if current else None)
    names = " or ".join(contexts) or "one that you add"
    if chosen is None:
        raise Permanent(f"the kubeconfig has no current-context; set it to {names}")
    if chosen not in contexts:
        raise Permanent(f"the kubeconfig has no context '{chosen}'; use {names}")
    return chosen, contexts[chosen].get("namespace") or "default"


def _check_secret_files(
    paths: list[Path], contents: list[dict[str, Any]], context: str | None
) -> None:
    """Raises Permanent if the user of the context names a file that does not exist, without quoting
    the name: it may be the secret itself."""

    def first(kind: str, name: object) -> tuple[Path, dict[str, Any]]:
        for path, content in zip(paths, contents, strict=True):
            for entry in content.get(f"{kind}s") or []:
                if entry["name"] == name:
                    return path, entry[kind] or {}
        return Path(), {}

    path, user = first("user", first("context", context)[1].get("user"))
    for field in SECRET_FILES:
        if field in user and not os.path.isfile(path.parent / str(user[field])):
            raise Permanent(
                f"the kubeconfig {path}: the {field} of the context's user is not the path of a "
                "file; correct it, or remove it and give the content itself in "
                f"{SECRET_FILES[field]}"
            )


@contextmanager
def _plugin_errors() -> Iterator[list[str]]:
    """Collects, and hides, what the client logs on the root logger when an exec plugin fails."""
    errors: list[str] = []
    root, silent = logging.getLogger(), logging.NullHandler()

    def collect(record: logging.LogRecord) -> bool:
        errors.append(one_line(record.getMessage()))
        return False

    root.addHandler(silent)  # without a handler, logging would install one permanently
    root.addFilter(collect)
    try:
        yield errors
    finally:
        root.removeFilter(collect)
        root.removeHandler(silent)


def _check_certificates(configuration: "Configuration") -> None:
    """Raises Permanent if a certificate or key cannot be used; found later, this would look like
    an untrusted server."""
    authority, own = configuration.ssl_ca_cert, configuration.cert_file
    field = "certificate-authority"
    try:
        if authority:
            ssl.create_default_context(cafile=authority)
        field = "client-certificate and client-key"
        if own:
            # Without the empty password, an encrypted key would prompt for one.
            ssl.create_default_context().load_cert_chain(own, configuration.key_file, "")
    except (OSError, ValueError) as error:
        raise Permanent(
            f"the kubeconfig's {field} cannot be used ({one_line(error)}); correct the kubeconfig"
        ) from None


def _check_address(purpose: str, address: object, schemes: tuple[str, ...]) -> None:
    """Raises Permanent if an address has no host, an invalid port or none of `schemes`. The error
    omits everything before the last "@", because a malformed password may contain any character."""
    if not isinstance(address, str):
        raise Permanent(f"{purpose} is not text; write it like {schemes[-1]}://HOST:PORT")
    scheme, mark, _ = address.partition("://")
    _, login, shown = address.rpartition("@")
    if not mark:
        raise Permanent(f"{purpose}, {shown}, has no scheme; write {schemes[0]}://{shown}")
    if login and scheme.isalnum():
        shown = f"{scheme}://{shown}"
    try:
        parts = urlsplit(address)
        usable = scheme.lower() in schemes and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise Permanent(f"{purpose}, {shown}, is invalid; write it like {schemes[-1]}://HOST:PORT")
