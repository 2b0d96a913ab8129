{{/* The Ray cluster spec of RayCluster, RayJob and RayService: a head that runs no tasks, and worker
groups. Called with (dict "root" $ "component" "cluster" "spec" .Values.cluster), and with "live", the
existing object, if the autoscaler may have changed its groups. */}}
{{- define "zephyr.raySpec" -}}
{{- $values := .root.Values -}}
rayVersion: {{ $values.ray.version | quote }}
authOptions:
  mode: {{ $values.ray.auth }}
enableInTreeAutoscaling: {{ .spec.autoscaling }}
{{- if .spec.autoscaling }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ $values.ray.autoscaler.idleTimeoutSeconds | int64 }}
  resources:
    {{- include "zephyr.resources" (dict "resources" $values.ray.autoscaler.resources) | nindent 4 }}
  securityContext:
    {{- include "zephyr.containerSecurity" .root | nindent 4 }}
  env:
    - name: HOME
      value: /scratch
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {{ include "zephyr.rayTmp" . }}
    - {name: scratch, mountPath: /scratch}
{{- end }}
{{- with $values.ray.gcsFaultTolerance }}
{{- if .enabled }}
gcsFaultToleranceOptions:
  redisAddress: {{ .redisAddress | quote }}
  {{- if and .existingSecret .usernameKey }}
  redisUsername:
    valueFrom:
      secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .usernameKey | quote }}}
  {{- end }}
  {{- if .existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .passwordKey | quote }}}
  {{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    # Keeps the head's CPUs for the control plane and the drivers of jobs.
    num-cpus: "0"
    dashboard-host: "0.0.0.0"
    {{- with $values.ray.head.rayStartParams }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  template:
    {{- include "zephyr.pod" (dict "root" .root "at" "ray.head" "part" $values.ray.head "pod" (include "zephyr.headPod" .)) | nindent 4 }}
# The list has one owner. Defaults and empty objects are written out, so that the operator's updates
# do not change it. What the autoscaler changed is sent back unchanged.
workerGroupSpecs:
  {{- $call := . }}
  {{- $live := dict }}
  {{- range dig "spec" "workerGroupSpecs" list (.live | default dict) }}
  {{- $_ := set $live .groupName . }}
  {{- end }}
  {{- range $name := .spec.workerGroups }}
  {{- $group := get $values.workerGroups $name }}
  {{- $replicas := ternary $group.replicas $group.minReplicas (hasKey $group "replicas") }}
  {{- $scaling := dict }}
  {{- with get $live $name }}
  {{- $replicas = min $group.maxReplicas (max $group.minReplicas .replicas) }}
  {{- $scaling = .scaleStrategy | default dict }}
  {{- end }}
  - groupName: {{ $name | quote }}
    replicas: {{ $replicas }}
    minReplicas: {{ $group.minReplicas }}
    maxReplicas: {{ $group.maxReplicas }}
    numOfHosts: 1
    priority: 0
    scaleStrategy: {{ toJson $scaling }}
    {{- with $group.labels }}
    labels:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    rayStartParams: {{- if $group.rayStartParams }}
      {{- toYaml $group.rayStartParams | nindent 6 }}
    {{- else }} {}
    {{- end }}
    template:
      {{- $pod := include "zephyr.workerPod" (merge (dict "group" $group "name" $name) $call) }}
      {{- include "zephyr.pod" (dict "root" $call.root "at" (printf "workerGroups.%s" $name) "part" $group "pod" $pod) | nindent 6 }}
  {{- end }}
{{- end -}}

{{- define "zephyr.headPod" -}}
{{- $values := .root.Values -}}
{{- $head := $values.ray.head -}}
metadata:
  labels:
    {{- include "zephyr.podLabels" . | nindent 4 }}
spec:
  # A head restarted in place would have lost its state; the operator creates a new pod instead.
  restartPolicy: Never
  # Only the autoscaler, a container of this pod, calls the API server.
  serviceAccountName: {{ include "zephyr.account" (dict "root" .root "for" (ternary "autoscaler" "ray" .spec.autoscaling)) }}
  automountServiceAccountToken: {{ .spec.autoscaling }}
  containers:
    - name: ray-head
      image: {{ include "zephyr.image" (dict "root" .root) }}
      ports:
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        - {name: metrics, containerPort: 8080, protocol: TCP}
        - {name: as-metrics, containerPort: 44217, protocol: TCP}
        - {name: dash-metrics, containerPort: 44227, protocol: TCP}
        {{- if eq .component "serve" }}
        - {name: serve, containerPort: 8000, protocol: TCP}
        {{- end }}
      {{- include "zephyr.rayContainer" . | nindent 6 }}
      resources:
        {{- include "zephyr.resources" (dict "resources" $head.resources) | nindent 8 }}
  volumes:
    {{- include "zephyr.rayVolumes" . | nindent 4 }}
{{- end -}}

{{- define "zephyr.workerPod" -}}
{{- $values := .root.Values -}}
{{- $group := .group -}}
metadata:
  labels:
    {{- include "zephyr.podLabels" . | nindent 4 }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "zephyr.account" (dict "root" .root "for" "ray") }}
  automountServiceAccountToken: false
  # Replicas of Serve take up to two minutes to finish their answers.
  terminationGracePeriodSeconds: {{ if eq .component "serve" }}150{{ else }}60{{ end }}
  {{- with $group.sameTopology }}
  affinity:
    podAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: {{ . | quote }}
          labelSelector:
            matchLabels:
              {{- include "zephyr.selector" $ | nindent 14 }}
              ray.io/group: {{ $.name | quote }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ include "zephyr.image" (dict "root" .root "gpus" $group.gpus "override" $group.image) }}
      ports:
        - {name: metrics, containerPort: 8080, protocol: TCP}
        {{- if eq .component "serve" }}
        - {name: serve, containerPort: 8000, protocol: TCP}
        {{- end }}
      {{- include "zephyr.rayContainer" . | nindent 6 }}
      resources:
        {{- include "zephyr.resources" $group | nindent 8 }}
  volumes:
    {{- include "zephyr.rayVolumes" . | nindent 4 }}
{{- end -}}

{{/* The parts shared by the containers of head and workers. */}}
{{- define "zephyr.rayContainer" -}}
env:
  {{- include "zephyr.rayEnv" . | trim | nindent 2 }}
volumeMounts:
  - {name: storage, mountPath: /mnt/zephyr}
  {{- if ne .component "serve" }}
  - {name: recipes, mountPath: /etc/zephyr/recipes, readOnly: true}
  {{- end }}
  - {name: tmp, mountPath: /tmp}
  {{- if and .spec.autoscaling (not .group) }}
  - {{ include "zephyr.rayTmp" . }}
  {{- end }}
  - {name: scratch, mountPath: /scratch}
{{- end -}}

{{/* The head and its autoscaler share /tmp/ray. Without this mount in both, the operator would mount
a volume without a size limit. */}}
{{- define "zephyr.rayTmp" -}}
{name: tmp, mountPath: /tmp/ray, subPath: ray}
{{- end -}}

{{- define "zephyr.rayEnv" -}}
{{- $values := .root.Values -}}
# The image's own home, which holds configs/, is read-only.
- name: HOME
  value: /scratch
# One pod downloads, all pods read.
- name: ZEPHYR_CACHE
  value: /mnt/zephyr/cache/weights
- name: HF_HOME
  value: /mnt/zephyr/cache/huggingface
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: HF_HUB_DISABLE_TELEMETRY
  value: "1"
- name: VLLM_NO_USAGE_STATS
  value: "1"
{{- if eq .component "pipeline" }}
# A run's lease of the storage names the job: a newer attempt of it takes the lease over.
- name: ZEPHYR_JOB
  value: {{ include "zephyr.jobName" .root }}
{{- end }}
{{- if ne .component "serve" }}
{{ include "zephyr.mlflowEnv" .root | trim }}
{{- else }}
{{- range $name, $value := include "zephyr.serveEnv" .root | fromYaml }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
- name: ZEPHYR_API_KEYS
  valueFrom:
    secretKeyRef: {name: {{ $values.serve.apiKeys.existingSecret | quote }}, key: {{ $values.serve.apiKeys.key | quote }}}
{{- end }}
{{- range $values.ray.secretEnv }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}
{{- end }}
{{- range $name, $value := $values.ray.env }}
- name: {{ $name }}
  {{- with $value }}
  value: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Ray's settings for serving. zephyr_ray/serve/command.py owns them and gives the reasons; a test
compares the two. */}}
{{- define "zephyr.serveEnv" -}}
RAY_SERVE_ENABLE_DIRECT_INGRESS: "0"
RAY_SERVE_LOG_TO_STDERR: "0"
RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE: "1"
RAY_SERVE_THROUGHPUT_OPTIMIZED: "1"
RAY_worker_niceness: "0"
{{- end -}}

{{/* The operator adds /dev/shm, sized by memory. */}}
{{- define "zephyr.rayVolumes" -}}
- name: storage
  persistentVolumeClaim:
    claimName: {{ include "zephyr.storageClaim" .root | quote }}
{{- if ne .component "serve" }}
# The service does not mount recipes: a new recipe must not start a new service.
- name: recipes
  configMap:
    name: {{ include "zephyr.fullname" .root }}-recipes
    {{- with .root.Values.recipes }}
    # Keys cannot contain "/"; this restores the folders.
    items:
      {{- range $path, $_ := . }}
      - {key: {{ replace "/" "--" $path | quote }}, path: {{ $path | quote }}}
      {{- end }}
    {{- end }}
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ include "zephyr.quantity" .root.Values.ray.tmpSize }}
- name: scratch
  emptyDir:
    sizeLimit: {{ include "zephyr.quantity" .root.Values.ray.scratchSize }}
{{- end -}}

{{/* Queue labels of RayCluster, RayJob and RayService. Called with (dict "root" $ "name" …). */}}
{{- define "zephyr.queueLabels" -}}
{{- with .root.Values.scheduling }}
{{- if eq .scheduler "kueue" }}
kueue.x-k8s.io/queue-name: {{ .queue | quote }}
{{- with .priorityClass }}
kueue.x-k8s.io/priority-class: {{ . | quote }}
{{- end }}
{{- else if eq .scheduler "volcano" }}
ray.io/scheduler-name: volcano
volcano.sh/queue-name: {{ .queue | quote }}
{{- with .priorityClass }}
ray.io/priority-class-name: {{ . | quote }}
{{- end }}
{{- else if eq .scheduler "yunikorn" }}
ray.io/scheduler-name: yunikorn
ray.io/gang-scheduling-enabled: "true"
yunikorn.apache.org/app-id: {{ $.name }}
yunikorn.apache.org/queue: {{ .queue | quote }}
{{- else if eq .scheduler "kai" }}
ray.io/scheduler-name: kai-scheduler
kai.scheduler/queue: {{ .queue | quote }}
{{- end }}
{{- end }}
{{- end -}}
