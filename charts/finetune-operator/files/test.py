"""What `helm test` runs: is the operator ready, and does the coordinator answer as the training pods expect?"""

import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

DEADLINE = time.monotonic() + 60


def metrics_answer():
    with urllib.request.urlopen(os.environ["METRICS_URL"] + "/readyz", timeout=5) as response:
        return f"/readyz answers {response.status}"


def coordinator_refuses_strangers():
    context = ssl.create_default_context(cafile="/ca/ca.crt")
    host, port = os.environ["COORDINATOR_HOST"], int(os.environ["COORDINATOR_PORT"])
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=5)
    connection.request("POST", "/v1/beat", "{}")
    status = connection.getresponse().status
    if status != 401:
        raise OSError(f"a beat without a token was answered with {status}, not with 401")
    return "the coordinator shows a certificate of its authority and refuses a beat without a token"


def insist(check):
    while True:
        try:
            print(f"ok: {check()}", flush=True)
            return
        except (OSError, http.client.HTTPException, urllib.error.URLError) as error:
            if time.monotonic() > DEADLINE:
                sys.exit(f"failed: {check.__name__.replace('_', ' ')}: {error}")
            time.sleep(1)


insist(metrics_answer)
if "COORDINATOR_HOST" in os.environ:
    insist(coordinator_refuses_strangers)
