{{/* Names, labels, and the parts that pods of all kinds share. */}}

{{/* 35 characters at most: with the longest suffix a RayJob stays within 47. */}}
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

{{/* What selects pods of a component. Not app.kubernetes.io/name: the operator's services select
Ray pods by it. Called with (dict "root" $ "component" "cluster"). */}}
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
{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ if .gpus }}-gpu{{ end }}
{{- end -}}
{{- end -}}

{{- define "zephyr.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.user.id | int64 }}
runAsGroup: {{ .Values.user.group | int64 }}
fsGroup: {{ .Values.user.group | int64 }}
# A change of owner over all of a large storage would hold every start.
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

{{/* Requests and limits; requests of memory and GPUs equal their limits. Called with
(dict "resources" … "gpus" 8 "gpuResource" "nvidia.com/gpu"). */}}
{{- define "zephyr.resources" -}}
{{- $r := .resources -}}
limits:
  cpu: {{ $r.cpu | quote }}
  memory: {{ $r.memory }}
  {{- with $r.ephemeralStorage }}
  ephemeral-storage: {{ . }}
  {{- end }}
  {{- if .gpus }}
  {{ .gpuResource | default "nvidia.com/gpu" }}: {{ .gpus }}
  {{- end }}
requests:
  cpu: {{ $r.cpuRequest | default $r.cpu | quote }}
  memory: {{ $r.memory }}
  {{- with $r.ephemeralStorage }}
  ephemeral-storage: {{ . }}
  {{- end }}
  {{- if .gpus }}
  {{ .gpuResource | default "nvidia.com/gpu" }}: {{ .gpus }}
  {{- end }}
{{- end -}}

{{- define "zephyr.imagePull" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Where pods may run. Called with a group, the head, or mlflow. */}}
{{- define "zephyr.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Where a run keeps its record, and the account for it. */}}
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

{{/* One quoted word for a shell. */}}
{{- define "zephyr.quote" -}}
'{{ . | replace "'" "'\"'\"'" }}'
{{- end -}}

{{/* Bytes of a quantity such as 16Gi, 512M or 1073741824. */}}
{{- define "zephyr.bytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "" 1 -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $units $unit) | int64 -}}
{{- end -}}

{{/* Thousandths of a CPU: 500 of "500m" and of 0.5. */}}
{{- define "zephyr.millis" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text }}{{ trimSuffix "m" $text | int64 }}{{ else }}{{ mulf (float64 $text) 1000 | int64 }}{{ end -}}
{{- end -}}

{{/* "yes" where MLflow keeps something on its claim. */}}
{{- define "zephyr.mlflowLocal" -}}
{{- with .Values.mlflow }}
{{- if not (and .database.existingSecret .artifacts.destination) }}yes{{ end }}
{{- end }}
{{- end -}}

{{- define "zephyr.egressDns" -}}
- to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: kube-system
    # A cache on the node.
    - ipBlock:
        cidr: 169.254.20.10/32
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- define "zephyr.egressInternet" -}}
{{- with .Values.networkPolicy.internetPorts }}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        # Neighbours in the network, and the cloud's metadata with its credentials.
        except: [10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16]
  ports:
    {{- range . }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- end -}}

{{/* The port of a URL; that of its scheme where there is none. */}}
{{- define "zephyr.port" -}}
{{- regexFind ":[0-9]+(/.*)?$" . | regexFind "[0-9]+" | default (ternary "80" "443" (hasPrefix "http:" .)) -}}
{{- end -}}
