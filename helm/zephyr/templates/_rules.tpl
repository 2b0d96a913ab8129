{{/* Rules that the schema cannot express. Each fails with one line before the install; the operator
would report the error only afterwards, as an event. */}}
{{- define "zephyr.rules" -}}
{{- $v := .Values -}}
{{- include "zephyr.refuseSecrets" . }}

{{- $full := include "zephyr.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "the name '%s' must start with a letter and contain only a-z, 0-9 and '-'; choose another release name or set fullnameOverride" $full) }}
{{- end }}

{{- $parts := dict -}}
{{- range $name := list "cluster" "pipeline" "serve" }}
{{- $part := get $v $name }}
{{- if $part.enabled }}{{- $_ := set $parts $name $part }}{{- end }}
{{- end }}
{{- if $parts }}
{{- if not (.Capabilities.APIVersions.Has "ray.io/v1/RayCluster") }}
{{- fail "the KubeRay operator is not on this cluster; install it: helm install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm/ --version 1.7.0 --namespace kuberay-system --create-namespace (for `helm template` add --api-versions ray.io/v1/RayCluster)" }}
{{- end }}
{{- end }}

{{- if and (eq $v.ray.auth "token") (semverCompare "<2.52.0-0" $v.ray.version) }}
{{- fail (printf "ray.auth token needs Ray 2.52 or newer, but ray.version is %s; use an image with a newer Ray" $v.ray.version) }}
{{- end }}
{{- if semverCompare ">=2.11.0-0, <2.38.0-0" $v.ray.version }}
{{- fail (printf "ray.version %s: the agents of Ray 2.11 to 2.37 hang under the operator; use a newer version" $v.ray.version) }}
{{- end }}
{{- if and (eq $v.ray.auth "disabled") (not $v.networkPolicy.enabled) }}
{{- fail "ray.auth disabled with networkPolicy.enabled false would let anyone in the cluster run code here; enable one of them" }}
{{- end }}

{{- $ft := $v.ray.gcsFaultTolerance }}
{{- if and $ft.enabled (not $ft.redisAddress) }}
{{- fail "ray.gcsFaultTolerance.enabled needs an address; set ray.gcsFaultTolerance.redisAddress, such as redis:6379" }}
{{- end }}
{{- /* Ray's head would not start without the port. */}}
{{- if and $ft.redisAddress (not (regexMatch ":[0-9]+$" $ft.redisAddress)) }}
{{- fail (printf "ray.gcsFaultTolerance.redisAddress %s has no port; write it like %s:6379" $ft.redisAddress $ft.redisAddress) }}
{{- end }}
{{- if and $ft.enabled (not $v.storage.keep) (not $v.storage.existingClaim) }}
{{- fail "storage.keep false would delete the claim that the operator's clean-up of Redis mounts after an uninstall; set storage.keep, and delete the claim afterwards" }}
{{- end }}
{{- if and $ft.usernameKey (not $ft.existingSecret) }}
{{- fail "ray.gcsFaultTolerance.usernameKey names a key of a Secret; set ray.gcsFaultTolerance.existingSecret" }}
{{- end }}

{{- $forbidden := list "num-cpus" "num-gpus" "memory" "resources" }}
{{- $starts := dict "ray.head" $v.ray.head.rayStartParams }}
{{- range $name, $group := $v.workerGroups }}
{{- $_ := set $starts (printf "workerGroups.%s" $name) ($group.rayStartParams | default dict) }}
{{- end }}
{{- range $where, $params := $starts }}
{{- range $key := $forbidden }}
{{- if hasKey $params $key }}
{{- fail (printf "%s.rayStartParams.%s: Ray takes it from the resources, and the head's num-cpus is always \"0\"; remove it" $where $key) }}
{{- end }}
{{- end }}
{{- if hasKey $params "labels" }}
{{- fail (printf "%s.rayStartParams.labels: use the labels of the worker group instead" $where) }}
{{- end }}
{{- range $key := list "redis-password" "redis-username" "external-storage-namespace" }}
{{- if hasKey $params $key }}
{{- fail (printf "%s.rayStartParams.%s: use ray.gcsFaultTolerance instead" $where $key) }}
{{- end }}
{{- end }}
{{- range $key := list "dashboard-host" "dashboard-port" "include-dashboard" "metrics-export-port" "port" "address" "block" "head" }}
{{- if hasKey $params $key }}
{{- fail (printf "%s.rayStartParams.%s is set by the chart or the operator; remove it" $where $key) }}
{{- end }}
{{- end }}
{{- end }}

{{- range $name, $group := $v.workerGroups }}
{{- range $key := list "minReplicas" "maxReplicas" "resources" }}
{{- if not (hasKey $group $key) }}
{{- fail (printf "workerGroups.%s has no %s; set workerGroups.%s.%s" $name $key $name $key) }}
{{- end }}
{{- end }}
{{- range $key := list "cpu" "memory" }}
{{- if not (hasKey $group.resources $key) }}
{{- fail (printf "workerGroups.%s has no resources.%s; set workerGroups.%s.resources.%s" $name $key $name $key) }}
{{- end }}
{{- end }}
{{- if gt ($group.minReplicas | int) ($group.maxReplicas | int) }}
{{- fail (printf "workerGroups.%s: minReplicas %v is more than maxReplicas %v; lower it" $name $group.minReplicas $group.maxReplicas) }}
{{- end }}
{{- if hasKey $group "replicas" }}
{{- if or (lt ($group.replicas | int) ($group.minReplicas | int)) (gt ($group.replicas | int) ($group.maxReplicas | int)) }}
{{- fail (printf "workerGroups.%s: replicas %v is not between minReplicas %v and maxReplicas %v; change it" $name $group.replicas $group.minReplicas $group.maxReplicas) }}
{{- end }}
{{- end }}
{{- if and $group.sameTopology (hasKey ($group.affinity | default dict) "podAffinity") }}
{{- fail (printf "workerGroups.%s: sameTopology and affinity.podAffinity exclude each other; remove one" $name) }}
{{- end }}
{{- end }}

{{- include "zephyr.quantityRules" . }}

{{- if and $v.cluster.enabled (eq $v.ray.auth "token") }}
{{- $given := list $v.mlflow.auth.existingSecret $v.serve.apiKeys.existingSecret $v.mlflow.database.existingSecret $v.mlflow.artifacts.existingSecret $ft.existingSecret }}
{{- range $v.ray.secretEnv }}{{- $given = append $given .secret }}{{- end }}
{{- if has $full $given }}
{{- fail (printf "the Secret name '%s' is taken by the operator for the Ray cluster's token; rename your Secret" $full) }}
{{- end }}
{{- end }}

{{- $taken := list "HOME" "ZEPHYR_CACHE" "HF_HOME" "ZEPHYR_API_KEYS" "MLFLOW_TRACKING_URI" "MLFLOW_TRACKING_USERNAME" "MLFLOW_TRACKING_PASSWORD" "RAY_USAGE_STATS_ENABLED" "HF_HUB_DISABLE_TELEMETRY" "VLLM_NO_USAGE_STATS" "ZEPHYR_JOB" | concat (include "zephyr.operatorEnv" . | fromYamlArray) (include "zephyr.serveEnv" . | fromYaml | keys) }}
{{- $names := keys $v.ray.env }}
{{- range $v.ray.secretEnv }}{{- $names = append $names .name }}{{- end }}
{{- range $names }}
{{- if has . $taken }}
{{- fail (printf "ray.env and ray.secretEnv: %s is set by the chart or the operator; remove it" .) }}
{{- end }}
{{- end }}
{{- if ne (len $names) (len (uniq $names)) }}
{{- fail "ray.env and ray.secretEnv: a name appears twice; remove one" }}
{{- end }}

{{- if and (ne $v.storage.accessMode "ReadWriteMany") (not $v.storage.singleNode) }}
{{- fail (printf "storage.accessMode %s serves only one node; use ReadWriteMany, or set storage.singleNode if every pod runs on one node" $v.storage.accessMode) }}
{{- end }}

{{- range $name, $part := $parts }}
{{- range $part.workerGroups }}
{{- if not (hasKey $v.workerGroups .) }}
{{- fail (printf "%s.workerGroups: workerGroups has no group '%s'; add it, or use one of [%s]" $name . (keys $v.workerGroups | sortAlpha | join ", ")) }}
{{- end }}
{{- end }}
{{- if and (eq $v.scheduling.scheduler "kueue") $part.autoscaling }}
{{- fail (printf "scheduling.scheduler kueue admits only clusters of a fixed size; set %s.autoscaling to false" $name) }}
{{- end }}
{{- if not $part.autoscaling }}
{{- range $part.workerGroups }}
{{- $group := get $v.workerGroups . }}
{{- if not ($group.replicas | default $group.minReplicas | int) }}
{{- fail (printf "%s.workerGroups: group '%s' has no pods and no autoscaler to add any; set workerGroups.%s.replicas or minReplicas, or %s.autoscaling" $name . . $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $v.scheduling.scheduler "kueue") (or (has "head" $part.workerGroups) (has "submitter" $part.workerGroups)) }}
{{- fail (printf "%s.workerGroups: Kueue itself names a job's own pods 'head' and 'submitter'; rename that group" $name) }}
{{- end }}
{{- if and (eq $v.scheduling.scheduler "kueue") (gt (len $part.workerGroups) 7) }}
{{- fail (printf "%s.workerGroups has %d groups; Kueue accepts at most 7; remove some" $name (len $part.workerGroups)) }}
{{- end }}
{{- end }}
{{- if and $v.scheduling.scheduler (not $v.scheduling.queue) }}
{{- fail (printf "scheduling.scheduler %s needs a queue; set scheduling.queue" $v.scheduling.scheduler) }}
{{- end }}

{{- if $v.pipeline.enabled }}
{{- with $v.pipeline.recipe }}
{{- if not (or (hasPrefix "/" .) (hasPrefix "configs/" .) (hasKey $v.recipes .)) }}
{{- fail (printf "pipeline.recipe: recipes has no '%s'; add it, or use configs/… of the image or an absolute path" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- $bytes := 0 }}
{{- range $path, $text := $v.recipes }}
{{- $bytes = add $bytes (len $text) }}
{{- if contains "--" $path }}
{{- fail (printf "recipes: '%s' contains --, which the ConfigMap uses in place of /; rename it" $path) }}
{{- end }}
{{- end }}
{{- if gt $bytes 1000000 }}
{{- fail (printf "recipes are %d bytes in total; a ConfigMap holds 1 MB; put large files on the storage" $bytes) }}
{{- end }}

{{- range $v.rbac.submitters }}
{{- if and (eq .kind "ServiceAccount") (not .namespace) }}
{{- fail (printf "rbac.submitters: the ServiceAccount '%s' has no namespace; add it" .name) }}
{{- end }}
{{- end }}

{{- if $v.serve.enabled }}
{{- if not $v.serve.run }}
{{- fail "serve.enabled needs a run to serve; set serve.run to the name of a finished run on the storage" }}
{{- end }}
{{- if not $v.serve.apiKeys.existingSecret }}
{{- fail "serve.enabled needs API keys; set serve.apiKeys.existingSecret to a Secret: kubectl create secret generic zephyr-accounts --from-literal=ZEPHYR_API_KEYS=one-of-mine,another" }}
{{- end }}
{{- $gpus := 0 }}
{{- range $v.serve.workerGroups }}
{{- $gpus = max $gpus ((get $v.workerGroups .).gpus | default 0) }}
{{- end }}
{{- if gt ($v.serve.gpus | int) ($gpus | int) }}
{{- fail (printf "serve.gpus is %v, but no group in serve.workerGroups has that many; add one or lower serve.gpus" $v.serve.gpus) }}
{{- end }}
{{- if gt ($v.serve.maxTokens | int) ($v.serve.context | int) }}
{{- fail (printf "serve.maxTokens %v is more than serve.context %v, the maximum of prompt and answer together; lower it" $v.serve.maxTokens $v.serve.context) }}
{{- end }}
{{- if lt ($v.serve.maxReplicas | int) ($v.serve.replicas | int) }}
{{- fail (printf "serve.maxReplicas %v is less than serve.replicas %v; raise it" $v.serve.maxReplicas $v.serve.replicas) }}
{{- end }}
{{- end }}

{{- if $v.mlflow.enabled }}
{{- if not $v.mlflow.auth.existingSecret }}
{{- fail "mlflow.enabled needs an account; set mlflow.auth.existingSecret to a Secret: kubectl create secret generic zephyr-accounts --from-literal=username=zephyr --from-literal=password=\"$(openssl rand -hex 16)\" --from-literal=flask-secret-key=\"$(openssl rand -hex 16)\"" }}
{{- end }}
{{- if $v.mlflow.trackingUri }}
{{- fail "mlflow.trackingUri names another server; set mlflow.enabled to false" }}
{{- end }}
{{- end }}

{{- include "zephyr.accessRules" . }}
{{- include "zephyr.podRules" (dict "root" . "parts" $parts) }}
{{- end -}}
