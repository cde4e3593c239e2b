"""Calls `Check` of `grpc.health.v1.Health` until the standard input is closed.

Each of the channels is used by several threads, one call after another. No retry policy is configured, so gRPC repeats
only calls that the server has certainly not served (gRFC A6, transparent retries). Prints the number of calls, and
then one line for each call that failed.
"""

import sys
import threading

import grpc

CHANNELS = 4
THREADS_PER_CHANNEL = 5

options = (("grpc.use_local_subchannel_pool", 1),)
stop = threading.Event()
calls = [0] * (CHANNELS * THREADS_PER_CHANNEL)
failures = []


def run(number, channel):
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    while not stop.is_set():
        calls[number] += 1
        try:
            check(b"", timeout=10)
        except grpc.RpcError as error:
            failures.append(f"{error.code()} {error.details()}")


channels = [grpc.insecure_channel(sys.argv[1], options=options) for _ in range(CHANNELS)]
threads = [
    threading.Thread(target=run, args=(number, channels[number % CHANNELS]))
    for number in range(len(calls))
]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
print(sum(calls))
print("\n".join(failures))
