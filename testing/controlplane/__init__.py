"""A real Kubernetes control plane on loopback, for the tests and for anyone who works on the project.

`build` makes the programs from their Go modules, `pki` the certificates, `process` starts and ends programs, `api`
speaks to the API server, `nodes` makes kwok nodes, and `server` puts them together. `python -m testing.controlplane`
starts one in the foreground; `fixtures` is the pytest plugin.
"""
