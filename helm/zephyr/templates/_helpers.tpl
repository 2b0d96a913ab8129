{{/* Defines names, labels, and the parts shared by pods of all kinds. */}}

{{/* Completes .Values and checks the rules, once. A key that is null or missing, as in the values of
an older release, gets its default. Every template starts with this. */}}
{{- define "zephyr.prepare" -}}
{{- if not (hasKey .Values "prepared") }}
{{- $defaults := .Files.Get "defaults.yaml" | fromYaml }}
{{- include "zephyr.complete" (dict "values" .Values "defaults" $defaults) }}
{{- include "zephyr.rules" . }}
{{- $_ := set .Values "prepared" true }}
{{- end }}
{{- end -}}

{{/* Recurses into maps. A null removes a worker group, a key of one, or a user ID. */}}
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

{{/* Quotes one word for a shell, and splits $(NAME), which the kubelet would expand before it. */}}
{{- define "zephyr.quote" -}}
'{{ . | replace "'" "'\"'\"'" | replace "$(" "$'\"(\"'" }}'
{{- end -}}

{{/* Thousandths of a quantity such as 16Gi, 1.5G, 500m, 0.5 or 134217728. */}}
{{- define "zephyr.millis" -}}
{{- $units := dict "m" 1 "" 1000 "k" 1000000 "M" 1000000000 "G" 1000000000000 "T" 1000000000000000 "P" 1000000000000000000 "Ki" 1024000 "Mi" 1048576000 "Gi" 1073741824000 "Ti" 1099511627776000 "Pi" 1125899906842624000 -}}
{{- $text := include "zephyr.digits" . -}}
{{- if not (regexMatch "^[0-9]+([.][0-9]+)?(m|[KMGTP]i|[kMGTP])?$" $text) -}}
{{- fail (printf "the quantity '%s' is not one that the chart can write; write it like 500m, 2, 16Gi or 1.5T" $text) -}}
{{- end -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- $parts := splitn "." 2 (trimSuffix $unit $text) -}}
{{- if gt (mulf $parts._0 (get $units $unit)) 9.2e18 -}}
{{- fail (printf "the quantity '%s' is more than the chart can write; lower it" $text) -}}
{{- end -}}
{{- $fraction := trunc 3 (printf "%s000" ($parts._1 | default "")) -}}
{{- add (mul (int64 $parts._0) (get $units $unit)) (mul (trimPrefix "0" $fraction | trimPrefix "0" | int64) (div (get $units $unit) 1000)) -}}
{{- end -}}

{{/* A number or text as text. Helm reads numbers as floats, which Go writes as 1e+06. */}}
{{- define "zephyr.digits" -}}
{{- if not (kindIs "float64" .) }}{{ . }}{{ else if eq (floor .) . }}{{ int64 . }}{{ else }}{{ printf "%.3f" . }}{{ end -}}
{{- end -}}

{{/* A quantity as Kubernetes writes it, a quoted string: "1Gi" of 1024Mi, "500m" of 0.5. In any other
form, the operator's first update of a RayJob or RayService would change the list of worker groups and
take it over from Helm, and the next upgrade would conflict. */}}
{{- define "zephyr.quantity" -}}
{{- $number := include "zephyr.millis" . | int64 -}}
{{- $base := ternary 1024 1000 (and (hasSuffix "i" (toString .)) (eq (mod $number 1000) 0)) -}}
{{- $suffixes := ternary (list "" "Ki" "Mi" "Gi" "Ti" "Pi") (list "m" "" "k" "M" "G" "T" "P") (eq $base 1024) -}}
{{- if eq $base 1024 }}{{- $number = div $number 1000 }}{{- end }}
{{- if eq $number 0 }}{{- $suffixes = list "" }}{{- end }}
{{- $suffix := first $suffixes -}}
{{- range rest $suffixes }}
{{- if eq (mod $number $base) 0 }}
{{- $number = div $number $base }}{{- $suffix = . }}
{{- end }}
{{- end }}
{{- printf "%d%s" $number $suffix | quote -}}
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
