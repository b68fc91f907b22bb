"""Run by `helm test`: check that the operator is ready and that training pods can reach the coordinator."""

import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

DEADLINE = time.monotonic() + 60


def operator_is_ready():
    with urllib.request.urlopen(os.environ["METRICS_URL"] + "/readyz", timeout=5) as response:
        return f"/readyz returned {response.status}"


def coordinator_refuses_unauthenticated_heartbeats():
    context = ssl.create_default_context(cafile="/ca/ca.crt")
    host, port = os.environ["COORDINATOR_HOST"], int(os.environ["COORDINATOR_PORT"])
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=5)
    connection.request("POST", "/v1/beat", "{}")
    status = connection.getresponse().status
    if status != 401:
        raise OSError(f"a heartbeat without a token got status {status} instead of 401")
    return "the certificate of the coordinator is valid, and it refuses a heartbeat without a token"


def retry(check):
    while True:
        try:
            print(f"ok: {check()}", flush=True)
            return
        except (OSError, http.client.HTTPException, urllib.error.URLError) as error:
            if time.monotonic() > DEADLINE:
                sys.exit(f"failed: {check.__name__.replace('_', ' ')}: {error}")
            time.sleep(1)


retry(operator_is_ready)
if "COORDINATOR_HOST" in os.environ:
    retry(coordinator_refuses_unauthenticated_heartbeats)
