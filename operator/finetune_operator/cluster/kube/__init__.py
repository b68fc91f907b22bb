"""The cluster behind a real API server: `finetune-operator run`.

`operator` puts the parts together. `client` speaks HTTP, `cache` and `reflector` hold what was last seen, `queue` and
`workers` make the passes, `cluster` fulfils `cluster.protocol.Cluster`, `lease` says who may write.
"""
