{{- define "finetune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if contains (include "finetune.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "finetune.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: {{ include "finetune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "finetune.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "finetune.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: set the name of the account to use, or set serviceAccount.create to true" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "finetune.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "finetune.coordinator" -}}
{{ include "finetune.fullname" . }}-coordinator
{{- end }}

{{- define "finetune.coordinatorHost" -}}
{{ include "finetune.coordinator" . }}.{{ .Release.Namespace }}.svc
{{- end }}

{{- /* The Secret with the coordinator's certificate. */}}
{{- define "finetune.tlsSecret" -}}
{{- if eq .Values.coordinator.tls.mode "secret" }}
{{- required "coordinator.tls.secretName: mode secret needs the name of a Secret with tls.crt, tls.key and ca.crt" .Values.coordinator.tls.secretName }}
{{- else }}
{{- include "finetune.fullname" . }}-tls
{{- end }}
{{- end }}

{{- define "finetune.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "finetune.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "finetune.subjects" -}}
subjects:
  - kind: ServiceAccount
    name: {{ include "finetune.serviceAccount" . }}
    namespace: {{ .Release.Namespace }}
{{- end }}

{{- /* Flags that the chart sets from its own values. They are refused in `flags`, because they would be set twice. */}}
{{- define "finetune.checks" -}}
{{- $own := list "namespaces" "watch-nodes" "leader-election" "identity" "taint-after-jobs" "disruption-budgets" "eviction-requests" "gangs" "kueue" "kueue-priority-boost" "kueue-topology" "rack-label" "resize-pods" "user-namespaces" "kubeconfig" "context" "lease-name" "lease-namespace" "coordinator" "coordinator-port" "coordinator-tls-cert" "coordinator-tls-key" "coordinator-ca" "coordinator-tls-secret" "coordinator-ca-config" "coordinator-service" "coordinator-url" "pod-ip" "trainer-image-gpu" "trainer-image-cpu" "trainer-image-cpu-intel" "trainer-image-export" "trainer-user-id" "cores-per-rank" "cache-claim" "probe-port" "log-format" "log-level" }}
{{- range $name, $_ := .Values.flags }}
{{- if has $name $own }}
{{- fail (printf "flags.%s: the chart sets this flag from another value; see values.yaml and set that one" $name) }}
{{- end }}
{{- end }}
{{- if and .Values.coordinator.enabled (eq (int .Values.metrics.port) (int .Values.coordinator.port)) }}
{{- fail (printf "metrics.port: %d is the port of the coordinator; set another port" (int .Values.metrics.port)) }}
{{- end }}
{{- if and .Values.coordinator.tls.secretName (ne .Values.coordinator.tls.mode "secret") }}
{{- fail "coordinator.tls.secretName: only mode secret uses a given Secret; set coordinator.tls.mode to secret, or remove the name" }}
{{- end }}
{{- if and .Values.coordinator.tls.issuerRef.name (ne .Values.coordinator.tls.mode "certManager") }}
{{- fail "coordinator.tls.issuerRef.name: only mode certManager uses an issuer; set coordinator.tls.mode to certManager, or remove the name" }}
{{- end }}
{{- range $name, $_ := .Values.podLabels }}
{{- if hasKey (include "finetune.labels" $ | fromYaml) $name }}
{{- fail (printf "podLabels.%s: the chart sets this label itself; remove it" $name) }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if has .name (list "FINETUNE_POD_IP" "FINETUNE_IDENTITY") }}
{{- fail (printf "extraEnv: the chart sets %s itself, for each replica; remove it" .name) }}
{{- end }}
{{- end }}
{{- $flag := .Values.flags }}
{{- if le (float64 (default 60 (get $flag "beat-timeout-seconds"))) (float64 (default 5 (get $flag "beat-seconds"))) }}
{{- fail "flags.beat-timeout-seconds: set more than beat-seconds; otherwise every pod is reported as silent" }}
{{- end }}
{{- if lt (float64 (default 300 (get $flag "failure-backoff-max-seconds"))) (float64 (default 10 (get $flag "failure-backoff-seconds"))) }}
{{- fail "flags.failure-backoff-max-seconds: set at least failure-backoff-seconds" }}
{{- end }}
{{- if not (regexMatch "^[a-z]" (include "finetune.fullname" .)) }}
{{- fail (printf "the release name %s begins with a digit, which a Service may not; set fullnameOverride" .Release.Name) }}
{{- end }}
{{- if and (eq .Values.coordinator.tls.mode "certManager") (not .Values.coordinator.tls.issuerRef.name) }}
{{- fail "coordinator.tls.issuerRef.name: mode certManager needs the name of an Issuer or ClusterIssuer" }}
{{- end }}
{{- if and .Values.podDisruptionBudget.enabled (gt (int .Values.replicas) 1) (ge (int .Values.podDisruptionBudget.minAvailable) (int .Values.replicas)) }}
{{- fail "podDisruptionBudget.minAvailable: set a value below replicas; otherwise no node with an operator pod can be drained" }}
{{- end }}
{{- end }}
