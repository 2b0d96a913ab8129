"""Checks before a run that an endpoint can be reached: proxy variables, connection, key."""

import time
from typing import TYPE_CHECKING
from urllib.request import getproxies

from zephyr_ray.engines.replies import FIXES
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import shorten

if TYPE_CHECKING:
    from httpx2 import Response
    from openai import OpenAI

PAUSES = (1, 2)
"""Seconds between attempts to connect: a server may just be starting."""


def check_proxies() -> None:
    """Raises Permanent if the HTTP client cannot use a proxy variable. The client reads all of
    them, even one that NO_PROXY makes unnecessary."""
    import httpx2

    for scheme, value in getproxies().items():
        if scheme not in ("http", "https", "all"):
            continue
        variable = _variable(scheme)
        # The client, too, takes a value without a scheme for an HTTP proxy.
        url = value if "://" in value else f"http://{value}"
        try:
            httpx2.HTTPTransport(proxy=url, verify=False)
            usable = bool(httpx2.URL(url).host)
        except ImportError:
            raise Permanent(
                f"{variable} is a SOCKS proxy, which needs the package socksio; set an HTTP proxy "
                "or install socksio"
            ) from None
        except (ValueError, httpx2.InvalidURL):
            usable = False
        if not usable:
            # The exception's text is omitted, because it may quote a part of the password.
            raise Permanent(
                f"{variable} is not the URL of an http, https or socks5 proxy; correct or unset it"
            )


def check_reachable(client: "OpenAI", key_variable: str | None) -> None:
    """Raises Permanent if the client cannot connect, or if its key, its credits or its proxy
    password are refused.

    Asks for the list of models, which is free. Almost any reply will do: some endpoints have no
    such list, and a restricted key may get status 403 for it. Refused are status 401, 402 and 407,
    a web page instead of the list, and a redirect to another address.
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
                proxy = proxy_variable(address)
                via = f" through the proxy of {proxy}" if proxy else ""
                fix = f"correct {proxy}" if proxy else "start the server or correct base_url"
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
        # Some frameworks only add a slash at the end, and not to the other paths.
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


def proxy_variable(address: str) -> str | None:
    """Returns the variable of the proxy that the HTTP client uses for an address; None if it uses
    none."""
    from httpx2 import URL
    from httpx2._utils import URLPattern, get_environment_proxies

    proxies = get_environment_proxies()
    for pattern in sorted(map(URLPattern, proxies)):
        if pattern.matches(URL(address)):
            return _variable(pattern.scheme or "all") if proxies[pattern.pattern] else None
    return None


def _variable(scheme: str) -> str:
    return f"{scheme.upper()}_PROXY"
