"""Uploads to a server over HTTP/2 without TLS. Arguments: address, number of uploads, size.

Prints the duration in seconds and the status, or the error, of each.
"""

import sys
import time

import httpx

address, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for _ in range(count):
    # A connection for each upload.
    with httpx.Client(http1=False, http2=True, timeout=10, trust_env=False) as client:
        began = time.monotonic()
        try:
            result = client.post(f"http://{address}/", content=bytes(size)).status_code
        except httpx.HTTPError as error:
            result = repr(error)
        print(time.monotonic() - began, result)
