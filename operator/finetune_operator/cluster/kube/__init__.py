"""The cluster behind a real API server: `finetune-operator run`.

`operator` runs one replica and `term` its time as leader. `cluster` implements `cluster.protocol.Cluster`. `client`
sends requests, `watch` caches objects, `work` schedules reconciles, `beats` receives heartbeats, `tls` manages
certificates and `leader` elects the replica that may write.
"""
