"""A real Kubernetes control plane on the loopback interface, for tests and development.

`build` builds the programs from their Go modules, `pki` creates certificates, `process` starts and stops programs,
`api` sends requests to the API server, `nodes` creates kwok nodes, and `server` combines them. `python -m
testing.controlplane` starts one in the foreground; `fixtures` is the pytest plugin.
"""
