"""A gRPC server that ends each connection with GOAWAY after about one second.

It responds SERVING to `Check` of `grpc.health.v1.Health`. The metadata `peer` of the response identifies the connection.
"""

import sys
import time
from concurrent import futures

import grpc

SERVING = b"\x08\x01"


# Seconds for one call: all calls of the client are in flight when a connection ends.
CALL_TIME = 0.025


def check(request, context):
    time.sleep(CALL_TIME)
    context.send_initial_metadata((("peer", context.peer()),))
    return SERVING


options = (
    ("grpc.max_connection_age_ms", 1000),
    ("grpc.max_connection_age_grace_ms", 1000),
    ("grpc.so_reuseport", 0),
)
server = grpc.server(futures.ThreadPoolExecutor(max_workers=64), options=options)
# Without serializers, messages are bytes.
methods = {"Check": grpc.unary_unary_rpc_method_handler(check)}
server.add_generic_rpc_handlers(
    (grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods),)
)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
server.stop(None)
