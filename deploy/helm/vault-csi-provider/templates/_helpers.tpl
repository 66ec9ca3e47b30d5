{{- define "vault-csi-provider.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "vault-csi-provider.fullname" -}}
{{- $name := include "vault-csi-provider.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- /* Room for what is put behind it: 63 less the longest, "-critical-pods". */ -}}
{{- default $full .Values.fullnameOverride | trunc 48 | trimSuffix "-" -}}
{{- end }}

{{- define "vault-csi-provider.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "vault-csi-provider.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: which account to use, where serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "vault-csi-provider.selector" -}}
app.kubernetes.io/name: {{ include "vault-csi-provider.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vault-csi-provider.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{ include "vault-csi-provider.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* A value that may be YAML, or a string of YAML with templates in it: {value, root}. */ -}}
{{- define "vault-csi-provider.yaml" -}}
{{- if kindIs "string" .value -}}
{{- tpl .value .root -}}
{{- else -}}
{{- toYaml .value -}}
{{- end -}}
{{- end }}

{{- define "vault-csi-provider.image" -}}
{{- with .Values.image.registry }}{{ . }}/{{ end -}}
{{ .Values.image.repository }}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}
{{- else }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end }}

{{- define "vault-csi-provider.address" -}}
{{- required "vaultAddress: where Vault or OpenBao is, as --set vaultAddress=https://vault.example.com:8200" .Values.vaultAddress -}}
{{- end }}

{{- define "vault-csi-provider.hmacSecretName" -}}
{{- default "vault-csi-provider-hmac-key" .Values.hmacSecretName -}}
{{- end }}

{{- /* "true" where a right is bound, which takes the account's token. */ -}}
{{- define "vault-csi-provider.token" -}}
{{- or .Values.rbac.tokenRequest .Values.rbac.hmacSecret .Values.sweep.enabled -}}
{{- end }}

{{- define "vault-csi-provider.hasCA" -}}
{{- if and .Values.vaultCA.configMap .Values.vaultCA.secret -}}
{{- fail "vaultCA: name a configMap or a secret, not both" -}}
{{- end -}}
{{- if or .Values.vaultCA.configMap .Values.vaultCA.secret }}true{{ end -}}
{{- end }}

{{- define "vault-csi-provider.metricsPort" -}}
{{- default .Values.healthPort .Values.metrics.port -}}
{{- end }}

{{- define "vault-csi-provider.metricsPortName" -}}
{{- ternary "health" "metrics" (eq (int .Values.healthPort) (int (include "vault-csi-provider.metricsPort" .))) -}}
{{- end }}

{{- /* The API server refuses a DaemonSet in which both are 0, or neither is. */ -}}
{{- define "vault-csi-provider.updateStrategy" -}}
{{- $given := .Values.daemonSet.updateStrategy -}}
type: {{ $given.type }}
{{- if eq $given.type "RollingUpdate" }}
{{- $surge := toString $given.maxSurge }}
{{- $unavailable := toString $given.maxUnavailable }}
{{- if eq $surge "" }}
{{- $surge = ternary "1" "0" (and (not .Values.hostNetwork) (has $unavailable (list "" "0" "0%"))) }}
{{- end }}
{{- if eq $unavailable "" }}
{{- $unavailable = ternary "1" "0" (has $surge (list "0" "0%")) }}
{{- end }}
{{- $zeros := list (has $surge (list "0" "0%")) (has $unavailable (list "0" "0%")) | uniq }}
{{- if ne (len $zeros) 2 }}
{{- fail (printf "daemonSet.updateStrategy: of maxSurge (%s) and maxUnavailable (%s) one has to be 0, and the other not" $surge $unavailable) }}
{{- end }}
{{- if and .Values.hostNetwork (not (has $surge (list "0" "0%"))) }}
{{- fail "daemonSet.updateStrategy.maxSurge: with hostNetwork a second pod finds its port taken, so it has to be 0" }}
{{- end }}
rollingUpdate:
  maxSurge: {{ $surge }}
  maxUnavailable: {{ $unavailable }}
{{- end }}
{{- end }}

{{- define "vault-csi-provider.args" -}}
# The file's name is the provider's name: a SecretProviderClass finds it with `provider: {{ .Values.providerName }}`.
- -endpoint=/provider/{{ .Values.providerName }}.sock
- -health-addr=:{{ .Values.healthPort }}
{{- if .Values.hardened }}
- -hardened
{{- end }}
{{- with .Values.allowedVaultAddresses }}
- {{ printf "-allowed-vault-addresses=%s" (join "," .) | quote }}
{{- end }}
{{- if not (kindIs "invalid" .Values.allowSkipTLSVerify) }}
- -allow-skip-tls-verify={{ .Values.allowSkipTLSVerify }}
{{- end }}
{{- if .Values.tlsRoot }}
- {{ printf "-tls-root=%s" .Values.tlsRoot | quote }}
{{- else if and .Values.hardened (include "vault-csi-provider.hasCA" .) }}
- -tls-root=/etc/vault-ca
{{- end }}
{{- with .Values.unknownFields }}
- -unknown-fields={{ . }}
{{- end }}
{{- range $flag, $most := dict "mounts" .Values.maxPodMounts "objects" .Values.maxPodObjects "mib" .Values.maxPodMiB }}
{{- if not (kindIs "invalid" $most) }}
- -max-pod-{{ $flag }}={{ int $most }}
{{- end }}
{{- end }}
{{- with .Values.vaultAuthMountPath }}
- {{ printf "-vault-mount=%s" . | quote }}
{{- end }}
{{- with .Values.hmacSecretName }}
- -hmac-secret-name={{ . }}
{{- end }}
{{- if .Values.stateDir.enabled }}
- -state-dir=/state
{{- end }}
{{- if not .Values.sweep.enabled }}
- -revoke=never
{{- else if .Values.sweep.interval }}
- -sweep-interval={{ .Values.sweep.interval }}
{{- end }}
{{- with .Values.refreshAfter }}
- -refresh-after={{ . }}
{{- end }}
{{- if not .Values.templates }}
- -templates=off
{{- end }}
{{- if not .Values.metrics.enabled }}
- -metrics-addr=off
{{- else if eq (include "vault-csi-provider.metricsPortName" .) "metrics" }}
- -metrics-addr=:{{ include "vault-csi-provider.metricsPort" . }}
{{- end }}
{{- if eq .Values.auditLog.destination "file" }}
- -audit-log=/audit/audit.log
{{- else if ne .Values.auditLog.destination "off" }}
- -audit-log={{ .Values.auditLog.destination }}
{{- end }}
{{- if ne .Values.logLevel "info" }}
- -log-level={{ .Values.logLevel }}
{{- end }}
{{- if .Values.debug }}
- -debug
{{- end }}
{{- with .Values.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}
