{{/* Defines names, labels, and the parts shared by pods of all kinds. */}}

{{/* Completes .Values and checks the rules, once. A key that is null or missing, as in the values of
an older release, gets its default. Every template starts with this. */}}
{{- define "zephyr.prepare" -}}
{{- if not (hasKey .Values "prepared") }}
{{- $defaults := .Files.Get "files/defaults.yaml" | fromYaml }}
{{- include "zephyr.complete" (dict "values" .Values "defaults" $defaults) }}
{{- include "zephyr.rules" . }}
{{- $_ := set .Values "prepared" true }}
{{- end }}
{{- end -}}

{{/* Recurses into maps. A null removes a worker group, a key of a group, or a user ID. */}}
{{- define "zephyr.complete" -}}
{{- $values := .values }}
{{- range $key, $value := $values }}
{{- if kindIs "invalid" $value }}
{{- $_ := unset $values $key }}
{{- else if kindIs "map" $value }}
{{- include "zephyr.complete" (dict "values" $value "defaults" dict) }}
{{- end }}
{{- end }}
{{- range $key, $default := .defaults }}
{{- if not (hasKey $values $key) }}
{{- $_ := set $values $key $default }}
{{- else if and (kindIs "map" $default) (not (has $key (list "workerGroups" "user"))) }}
{{- include "zephyr.complete" (dict "values" (get $values $key) "defaults" $default) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* At most 35 characters: the longest suffix keeps a RayJob's name within 47. */}}
{{- define "zephyr.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 35 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 35 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 28 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end -}}

{{- define "zephyr.clusterName" -}}{{ include "zephyr.fullname" . }}{{- end -}}
{{- define "zephyr.jobName" -}}{{ include "zephyr.fullname" . }}-run-{{ .Values.pipeline.run }}{{- end -}}
{{- define "zephyr.serviceName" -}}{{ include "zephyr.fullname" . }}-serve{{- end -}}
{{- define "zephyr.mlflowName" -}}{{ include "zephyr.fullname" . }}-mlflow{{- end -}}
{{- define "zephyr.storageClaim" -}}
{{ .Values.storage.existingClaim | default (printf "%s-storage" (include "zephyr.fullname" .)) }}
{{- end -}}
{{- define "zephyr.mlflowClaim" -}}
{{ .Values.mlflow.storage.existingClaim | default (include "zephyr.mlflowName" .) }}
{{- end -}}

{{/* Labels of the chart's own objects. */}}
{{- define "zephyr.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Labels that select the pods of a component. app.kubernetes.io/name is not among them, because
the operator's services select Ray pods by it. Called with (dict "root" $ "component" "cluster"). */}}
{{- define "zephyr.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/part-of: zephyr
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Called with (dict "root" $ "gpus" 0 "override" ""). */}}
{{- define "zephyr.image" -}}
{{- $image := .root.Values.image -}}
{{- if .override -}}
{{ .override }}
{{- else -}}
{{ $image.repository }}
{{- with ternary $image.gpuDigest $image.digest (gt (.gpus | default 0 | int) 0) }}@{{ . }}
{{- else }}:{{ $image.tag | default $.root.Chart.AppVersion }}{{ if $.gpus }}-gpu{{ end }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "zephyr.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.user.id }}
runAsUser: {{ . | int64 }}
{{- end }}
{{- with .Values.user.group }}
runAsGroup: {{ . | int64 }}
fsGroup: {{ . | int64 }}
{{- end }}
# Otherwise every start changes the owner of all files on the storage.
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "zephyr.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Requests and limits; memory and GPU requests equal their limits. Called with
(dict "resources" … "gpus" 8 "gpuResource" "nvidia.com/gpu"). */}}
{{- define "zephyr.resources" -}}
limits:
  {{- include "zephyr.amounts" (dict "call" . "cpu" .resources.cpu) | nindent 2 }}
requests:
  {{- include "zephyr.amounts" (dict "call" . "cpu" (.resources.cpuRequest | default .resources.cpu)) | nindent 2 }}
{{- end -}}

{{- define "zephyr.amounts" -}}
cpu: {{ include "zephyr.quantity" .cpu }}
memory: {{ include "zephyr.quantity" .call.resources.memory }}
{{- with .call.resources.ephemeralStorage }}
ephemeral-storage: {{ include "zephyr.quantity" . }}
{{- end }}
{{- if .call.gpus }}
{{ .call.gpuResource | default "nvidia.com/gpu" }}: {{ include "zephyr.quantity" .call.gpus }}
{{- end }}
{{- end -}}

{{/* Address of the tracking server. */}}
{{- define "zephyr.mlflowUri" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "zephyr.mlflowName" . }}.{{ .Release.Namespace }}.svc:5000
{{- else -}}
{{ .Values.mlflow.trackingUri }}
{{- end -}}
{{- end -}}

{{- define "zephyr.mlflowEnv" -}}
{{- with include "zephyr.mlflowUri" . }}
- name: MLFLOW_TRACKING_URI
  value: {{ . | quote }}
{{- end }}
{{- with .Values.mlflow.auth }}
{{- if .existingSecret }}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .usernameKey | quote }}}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .passwordKey | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Quotes one word for a shell, and splits $(NAME), which the kubelet would otherwise expand. */}}
{{- define "zephyr.quote" -}}
'{{ . | replace "'" "'\"'\"'" | replace "$(" "$'\"(\"'" }}'
{{- end -}}

{{/* "yes" if MLflow stores anything on its claim, else empty. */}}
{{- define "zephyr.mlflowLocal" -}}
{{- with .Values.mlflow }}
{{- if not (and .database.existingSecret .artifacts.destination) }}yes{{ end }}
{{- end }}
{{- end -}}

{{/* The port of a URL, or the default port of its scheme. */}}
{{- define "zephyr.port" -}}
{{- regexFind ":[0-9]+(/.*)?$" . | regexFind "[0-9]+" | default (ternary "80" "443" (hasPrefix "http:" .)) -}}
{{- end -}}
