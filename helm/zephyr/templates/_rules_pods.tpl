{{/* Rules about the settings of pods. Called with (dict "root" $ "parts" …), the enabled parts by name. */}}
{{- define "zephyr.podRules" -}}
{{- $v := .root.Values -}}
{{- if and $v.image.digest (not $v.image.gpuDigest) }}
{{- range $part := .parts }}
{{- range $part.workerGroups }}
{{- $group := get $v.workerGroups . }}
{{- if and $group.gpus (not $group.image) }}
{{- fail (printf "image.digest is set, but workerGroups.%s uses the GPU image; set image.gpuDigest" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- $taken := include "zephyr.operatorEnv" . | fromYamlArray }}
{{- $ray := dict "ray.head" $v.ray.head }}
{{- range $name, $group := $v.workerGroups }}
{{- $_ := set $ray (printf "workerGroups.%s" $name) $group }}
{{- end }}
{{- range $at, $part := $ray }}
{{- range $part.extraEnv }}
{{- if has .name $taken }}
{{- fail (printf "%s.extraEnv: %s is set by the operator; remove it" $at .name) }}
{{- end }}
{{- end }}
{{- range concat ($part.sidecars | default list) ($part.initContainers | default list) }}
{{- if has .name (list "autoscaler" "wait-gcs-ready") }}
{{- fail (printf "%s: the operator adds a container '%s'; rename yours" $at .name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Variables that the operator adds to Ray's container or reads from it. */}}
{{- define "zephyr.operatorEnv" -}}
[RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_REDIS_ADDRESS, REDIS_PASSWORD, REDIS_USERNAME, RAY_enable_autoscaler_v2]
{{- end -}}
