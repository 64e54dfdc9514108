"""Picks engines for another proxy: an Envoy external processor (`envoy.service.ext_proc.v3.ExternalProcessor`).

It speaks the Endpoint Picker Protocol 1.0 of the Gateway API Inference Extension. `server` is its gRPC server, `stream`
one request of a proxy, `picked_request` that request as the dispatcher sees it, and `proxy_messages` the messages. All
decisions, and the state they are made from, are those of the gateway around it.
"""
