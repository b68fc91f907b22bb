"""The command `finetune-operator`: flags, logs, probes, and the process around Kopf."""
