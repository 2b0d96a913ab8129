"""Connects to an endpoint through its proxy, and checks before a run that it can be reached."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

from zephyr_ray.engines.replies import FIXES
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import shorten

if TYPE_CHECKING:
    from httpx2 import Response
    from openai import OpenAI

PAUSES = (1, 2)
"""Seconds between attempts to connect: a server may just be starting."""


@dataclass(frozen=True)
class Proxy:
    """A proxy set by an environment variable."""

    variable: str
    url: str
    """May contain a password."""


def find_proxy(address: str) -> Proxy | None:
    """Returns the proxy for an address, None if it needs none. Raises Permanent if the variable
    does not hold the URL of a proxy, `httpx2.InvalidURL` if the address is not a URL."""
    import httpx2

    target, proxies = httpx2.URL(address), getproxies()
    scheme = target.scheme if target.scheme in proxies else "all"
    hosts = target.host, target.netloc.decode()  # NO_PROXY may state a port
    if scheme not in proxies or any(map(proxy_bypass, hosts)):
        return None
    variable, value = f"{scheme.upper()}_PROXY", proxies[scheme]
    url = value if "://" in value else f"http://{value}"
    try:
        parsed = httpx2.URL(url)
        usable = parsed.scheme in ("http", "https") and parsed.host
    except httpx2.InvalidURL:
        usable = False
    if not usable:
        # The exception's text is omitted, because it may quote a part of the password.
        raise Permanent(f"{variable} is not the URL of an http or https proxy; correct or unset it")
    return Proxy(variable, url)


def sync_client(base_url: str, key: str, **options: Any) -> "OpenAI":
    """Returns OpenAI's client with the proxy of `find_proxy`. Raises the same errors."""
    import httpx2
    import openai

    proxy = find_proxy(base_url)
    # OpenAI's own HTTP client would read all proxy variables, even those that NO_PROXY overrides.
    http_client = openai.DefaultHttpx2Client(
        proxy=proxy.url if proxy else None, trust_env=False, verify=httpx2.create_ssl_context()
    )
    return openai.OpenAI(base_url=base_url, api_key=key, http_client=http_client, **options)


def check_reachable(client: "OpenAI", key_variable: str | None) -> None:
    """Raises Permanent if the client cannot connect, or if its key, its credits or its proxy
    password are refused.

    Asks for the list of models, which is free. Almost any reply will do: some endpoints have no
    such list, and a restricted key may get status 403 for it. Only status 401, 402 and 407, a web
    page instead of the list, and a redirect to another address are errors.
    """
    import httpx2
    import openai

    # A late reply is not a failure, because a small server may be busy with an answer.
    failures = (
        *(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError),
        # The server does not speak HTTP, or closes the connection.
        *(httpx2.RemoteProtocolError, httpx2.ReadError),
    )
    address = str(client.base_url)
    for pause in (*PAUSES, None):
        try:
            reply = client.get(
                "/models", cast_to=httpx2.Response, options={"follow_redirects": False}
            )
        except openai.AuthenticationError as error:
            fix = f"correct the key in {key_variable}" if key_variable else "set api_key_env"
            raise Permanent(f"{address}: {shorten(str(error))}; {fix}") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__
            if not isinstance(reason, failures):
                return
            if pause is None:
                variable = (proxy := find_proxy(address)) and proxy.variable
                via = f" through the proxy of {variable}" if variable else ""
                fix = f"correct {variable}" if variable else "start the server or correct base_url"
                raise Permanent(
                    f"cannot connect to {address}{via} ({describe(reason)}); {fix}"
                ) from None
            time.sleep(pause)
            continue
        except openai.APIStatusError as error:
            if error.status_code in (402, 407):
                fix = FIXES[error.status_code]
                raise Permanent(f"{address}: {shorten(str(error))}; {fix}") from None
            reply = error.response
        check_is_api(reply, address)
        return


def check_is_api(reply: "Response", address: str) -> None:
    """Raises Permanent if a reply to GET /models shows that base_url is not the address of an
    API."""
    target = reply.headers.get("location", "")
    if 300 <= reply.status_code < 400 and target:
        to = reply.url.join(target).copy_with(query=None)
        # Some frameworks redirect /models to the same path with a slash, but no other path.
        if str(to).rstrip("/") != str(reply.url.copy_with(query=None)).rstrip("/"):
            raise Permanent(f"{address}: redirects to {to}; set base_url to the API itself")
    if reply.status_code == 200 and "html" in reply.headers.get("content-type", ""):
        raise Permanent(
            f"{address}: answers with a web page, not JSON; set base_url to the API itself, whose "
            "address often ends in /v1"
        )


def describe(error: BaseException | None) -> str:
    """Returns why a connection failed: the text of the exception, or its type if it has none."""
    return shorten(str(error)) or type(error).__name__
