{{/* Defines MLflow's pod. */}}

{{- define "zephyr.mlflowPod" -}}
{{- $mlflow := .Values.mlflow -}}
{{- $image := $mlflow.image | default (include "zephyr.image" (dict "root" .)) -}}
metadata:
  labels:
    {{- include "zephyr.podLabels" (dict "root" . "component" "mlflow") | nindent 4 }}
  annotations:
    checksum/config: {{ include (print .Template.BasePath "/mlflow-configmap.yaml") . | sha256sum }}
spec:
  serviceAccountName: {{ include "zephyr.account" (dict "root" . "for" "mlflow") }}
  automountServiceAccountToken: false
  initContainers:
    - name: database
      image: {{ $image }}
      {{- if $mlflow.database.migrate }}
      command: [mlflow, db, upgrade, $(MLFLOW_BACKEND_STORE_URI)]
      {{- else }}
      command: [python, -c]
      args:
        - |
          {{- .Files.Get "files/check_database.py" | nindent 10 }}
      {{- end }}
      # `kubectl describe pod` then shows why the database was refused.
      terminationMessagePolicy: FallbackToLogsOnError
      env:
        {{- include "zephyr.mlflowStoreEnv" . | nindent 8 }}
      volumeMounts:
        {{- include "zephyr.mlflowMounts" . | nindent 8 }}
      resources:
        {{- include "zephyr.resources" (dict "resources" $mlflow.resources) | nindent 8 }}
  containers:
    - name: mlflow
      image: {{ $image }}
      command: [mlflow, server]
      args:
        - --app-name=basic-auth
        - --host=0.0.0.0
        - --port=5000
        - --workers=1
        {{- include "zephyr.mlflowHosts" . | nindent 8 }}
      ports:
        - {name: http, containerPort: 5000}
      env:
        {{- include "zephyr.mlflowStoreEnv" . | nindent 8 }}
        {{- include "zephyr.mlflowServerEnv" . | nindent 8 }}
      # The only page without a password.
      {{- range $probe := list "startupProbe" "readinessProbe" "livenessProbe" }}
      {{ $probe }}:
        httpGet: {path: /health, port: http}
      {{- end }}
      volumeMounts:
        - {name: config, mountPath: /etc/mlflow, readOnly: true}
        {{- include "zephyr.mlflowMounts" . | nindent 8 }}
      resources:
        {{- include "zephyr.resources" (dict "resources" $mlflow.resources) | nindent 8 }}
  volumes:
    - name: config
      configMap:
        name: {{ include "zephyr.mlflowName" . }}
    - name: tmp
      emptyDir:
        sizeLimit: 2Gi
    {{- if include "zephyr.mlflowLocal" . }}
    - name: data
      persistentVolumeClaim:
        claimName: {{ include "zephyr.mlflowClaim" . | quote }}
    {{- end }}
{{- end -}}

{{/* Host names that the server accepts, and the origins from which browsers may call it. */}}
{{- define "zephyr.mlflowHosts" -}}
{{- $mlflow := .Values.mlflow -}}
{{- $name := include "zephyr.mlflowName" . -}}
{{- $hosts := list "localhost" "localhost:*" "127.0.0.1:*" -}}
{{- range list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- $hosts = concat $hosts (list . (printf "%s:5000" .)) -}}
{{- end -}}
{{- $outside := concat $mlflow.allowedHosts (ternary (list $mlflow.ingress.host) list $mlflow.ingress.enabled) -}}
- --allowed-hosts={{ concat $hosts $outside | join "," }}
{{- with $outside }}
{{- $origins := list }}
{{- range . }}{{ $origins = concat $origins (list (printf "https://%s" .) (printf "http://%s" .)) }}{{ end }}
- --cors-allowed-origins={{ join "," $origins }}
{{- end }}
{{- end -}}

{{- define "zephyr.mlflowStoreEnv" -}}
- name: HOME
  value: /tmp
- name: MLFLOW_BACKEND_STORE_URI
  {{- with .Values.mlflow.database }}
  {{- if .existingSecret }}
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}
  {{- else }}
  value: sqlite:////mlflow/mlflow.db
  {{- end }}
  {{- end }}
{{- end -}}

{{- define "zephyr.mlflowServerEnv" -}}
{{- $mlflow := .Values.mlflow -}}
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
# Unused here; it would start seven more processes of 240 MB.
- name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION
  value: "false"
- name: MLFLOW_AUTH_CONFIG_PATH
  value: /etc/mlflow/auth.ini
{{- with $mlflow.auth }}
- name: MLFLOW_AUTH_ADMIN_USERNAME
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .usernameKey | quote }}}
- name: MLFLOW_AUTH_ADMIN_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .passwordKey | quote }}}
- name: MLFLOW_FLASK_SERVER_SECRET_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .flaskKey | quote }}}
{{- end }}
{{- with $mlflow.artifacts }}
- name: MLFLOW_ARTIFACTS_DESTINATION
  value: {{ .destination | default "/mlflow/artifacts" | quote }}
{{- with .endpointUrl }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .region }}
- name: AWS_DEFAULT_REGION
  value: {{ . | quote }}
{{- end }}
{{- if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .accessKeyIdKey | quote }}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .secretAccessKeyKey | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "zephyr.mlflowMounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if include "zephyr.mlflowLocal" . }}
- {name: data, mountPath: /mlflow}
{{- end }}
{{- end -}}
