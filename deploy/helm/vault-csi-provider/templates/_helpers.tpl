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

{{- /* Names are quoted wherever they stand: a release may be called 123. */ -}}
{{- define "vault-csi-provider.selector" -}}
app.kubernetes.io/name: {{ include "vault-csi-provider.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "vault-csi-provider.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | quote }}
{{ include "vault-csi-provider.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{- /* A value that may be YAML, or a string of YAML with templates in it: {name, value, root}. A string that holds
nothing comes to nothing. */ -}}
{{- define "vault-csi-provider.yaml" -}}
{{- if kindIs "string" .value -}}
{{- $read := fromYaml (printf "value:\n%s" (tpl .value .root | indent 2)) -}}
{{- if hasKey $read "Error" -}}
{{- fail (printf "%s: the string is no YAML: %s" .name $read.Error) -}}
{{- end -}}
{{- $expected := list "map" "slice" "invalid" -}}
{{- if not (has (kindOf $read.value) $expected) -}}
{{- fail (printf "%s: the string holds neither a map nor a list" .name) -}}
{{- end -}}
{{- with $read.value }}{{ toYaml . }}{{ end -}}
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

{{- /* Vault's chart has them below `global`, each as a map or as the name alone. */ -}}
{{- define "vault-csi-provider.imagePullSecrets" -}}
{{- $global := default dict .Values.global -}}
{{- with default $global.imagePullSecrets .Values.imagePullSecrets -}}
imagePullSecrets:
{{- range . }}
{{- if kindIs "string" . }}
  - name: {{ . | quote }}
{{- else }}
  - {{ toYaml . | nindent 4 | trim }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "vault-csi-provider.address" -}}
{{- $global := default dict .Values.global -}}
{{- required "vaultAddress: where Vault or OpenBao is, as --set vaultAddress=https://vault.example.com:8200" (default $global.externalVaultAddr .Values.vaultAddress) -}}
{{- end }}

{{- /* OpenBao's chart names the socket's path in place of the name. */ -}}
{{- define "vault-csi-provider.providerName" -}}
{{- $name := .Values.providerName -}}
{{- with .Values.daemonSet.endpoint -}}
{{- $told := base . | trimSuffix ".sock" -}}
{{- if not (has $name (list "vault" $told)) -}}
{{- fail (printf "daemonSet.endpoint: its socket is that of the provider %s, and providerName is %s: leave one out" $told $name) -}}
{{- end -}}
{{- $name = $told -}}
{{- end -}}
{{- $name -}}
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
{{- default .Values.healthPort .Values.metrics.port | int -}}
{{- end }}

{{- define "vault-csi-provider.metricsPortName" -}}
{{- ternary "health" "metrics" (eq (int .Values.healthPort) (int (include "vault-csi-provider.metricsPort" .))) -}}
{{- end }}

{{- /* A number of pods, a percentage, or nothing, as text. */ -}}
{{- define "vault-csi-provider.count" -}}
{{- if kindIs "string" . }}{{ . }}{{ else if not (kindIs "invalid" .) }}{{ int . }}{{ end -}}
{{- end }}

{{- /* The API server refuses a DaemonSet in which both are 0, or neither is. */ -}}
{{- define "vault-csi-provider.updateStrategy" -}}
{{- $given := .Values.daemonSet.updateStrategy -}}
type: {{ $given.type }}
{{- if eq $given.type "RollingUpdate" }}
{{- $surge := include "vault-csi-provider.count" $given.maxSurge }}
{{- $unavailable := include "vault-csi-provider.count" $given.maxUnavailable }}
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

{{- define "vault-csi-provider.sweepInterval" -}}
{{- with .Values.sweep.interval }}
{{- $start := toDate "2006-01-02" "2000-01-01" }}
{{- if lt ((mustDateModify . $start).Sub $start).Seconds 1.0 }}
{{- fail (printf "sweep.interval: %s is less than 1s; sweep.enabled=false turns the sweep off" .) }}
{{- end }}
{{- . }}
{{- end }}
{{- end }}

{{- /* Variables that the chart sets by itself; each may be there once. */ -}}
{{- define "vault-csi-provider.env" -}}
{{- $own := list "VAULT_ADDR" "NODE_NAME" "POD_NAME" "POD_NAMESPACE" -}}
- name: VAULT_ADDR
  value: {{ include "vault-csi-provider.address" . | quote }}
{{- with .Values.vaultNamespace }}
{{- $own = append $own "VAULT_NAMESPACE" }}
- name: VAULT_NAMESPACE
  value: {{ . | quote }}
{{- end }}
{{- if include "vault-csi-provider.hasCA" . }}
{{- $own = append $own "VAULT_CACERT" }}
- name: VAULT_CACERT
  value: {{ printf "/etc/vault-ca/%s" .Values.vaultCA.key | quote }}
{{- end }}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- range $name, $value := .Values.extraEnvironmentVars }}
{{- if has $name $own }}
{{- fail (printf "extraEnvironmentVars: %s is set by the chart (vaultAddress, vaultNamespace, vaultCA, or the pod itself)" $name) }}
{{- end }}
- name: {{ $name | quote }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- /* A probe, unless its values were taken away: {name, path, values}. */ -}}
{{- define "vault-csi-provider.probe" -}}
{{- if not (kindIs "invalid" .values) -}}
{{ .name }}:
  httpGet:
    path: {{ .path }}
    port: health
{{- with .values }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "vault-csi-provider.args" -}}
# The file's name is the provider's name: a SecretProviderClass finds it with `provider: {{ include "vault-csi-provider.providerName" . }}`.
- -endpoint=/provider/{{ include "vault-csi-provider.providerName" . }}.sock
- -health-addr=:{{ int .Values.healthPort }}
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
- {{ printf "-hmac-secret-name=%s" . | quote }}
{{- end }}
{{- if .Values.stateDir.enabled }}
- -state-dir=/state
{{- end }}
{{- if not .Values.sweep.enabled }}
- -revoke=never
{{- else }}
{{- with include "vault-csi-provider.sweepInterval" . }}
- {{ printf "-sweep-interval=%s" . | quote }}
{{- end }}
{{- end }}
{{- with .Values.refreshAfter }}
- {{ printf "-refresh-after=%s" . | quote }}
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

{{- /* Milliseconds of a duration as the Prometheus operator writes them. */ -}}
{{- define "vault-csi-provider.milliseconds" -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 "d" 86400000 "w" 604800000 "y" 31536000000 }}
{{- $sum := 0 }}
{{- range regexFindAll "[0-9]+(ms|[smhdwy])" . -1 }}
{{- $number := regexFind "^[0-9]+" . }}
{{- $sum = add $sum (mul ($number | int64) (get $units (trimPrefix $number .))) }}
{{- end }}
{{- $sum }}
{{- end }}

{{- /* What an endpoint of a monitor says beside its port: {name, monitor, root}. */ -}}
{{- define "vault-csi-provider.scraped" -}}
path: /metrics
{{- $interval := .monitor.interval }}
{{- with $interval }}
interval: {{ . | quote }}
{{- end }}
{{- with .monitor.scrapeTimeout }}
{{- if $interval }}
{{- if gt (include "vault-csi-provider.milliseconds" . | int64) (include "vault-csi-provider.milliseconds" $interval | int64) }}
{{- fail (printf "%s: the Prometheus operator takes no scrapeTimeout (%s) above the interval (%s)" $.name . $interval) }}
{{- end }}
{{- end }}
scrapeTimeout: {{ . | quote }}
{{- end }}
relabelings:
  # Which node it is: pods of a DaemonSet have names that tell nothing.
  - sourceLabels: [__meta_kubernetes_pod_node_name]
    targetLabel: node
{{- end }}
