{{/* Rules about the settings of pods. Called with (dict "root" $ "parts" …), the enabled parts by name. */}}
{{- define "zephyr.podRules" -}}
{{- $v := .root.Values -}}
{{- include "zephyr.reservedNames" (dict "at" "" "values" $v) -}}
{{- if and $v.image.tag (or $v.image.digest $v.image.gpuDigest) }}
{{- fail (printf "image.tag %s has no effect on an image with a digest; set the new digests and image.tag=\"\", or image.digest=\"\" and image.gpuDigest=\"\"" $v.image.tag) }}
{{- end }}
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

{{/* Rejects labels by which the operator's services and the chart select pods, and annotations that the
operator obeys. Not in the schema, because Helm would report a rejected name under another setting. */}}
{{- define "zephyr.reservedNames" -}}
{{- $at := .at -}}
{{- $selecting := "^app\\.kubernetes\\.io/(name|created-by|instance|component|part-of)$" -}}
{{- $annotations := "^ray\\.io/(ft-enabled|external-storage-namespace|overwrite-container-cmd)$" -}}
{{- $pods := "^(ray\\.io|app\\.kubernetes\\.io|helm\\.sh|zephyr-ray)/" -}}
{{- $reserved := dict "labels" $selecting "commonLabels" $pods "podLabels" $pods "annotations" $annotations "commonAnnotations" $annotations "podAnnotations" $annotations -}}
{{- range $key, $value := .values -}}
{{- if kindIs "map" $value -}}
{{- with get $reserved $key -}}
{{- range $name, $_ := $value -}}
{{- if regexMatch (get $reserved $key) $name -}}
{{- fail (printf "%s%s: the operator or the chart uses %s itself; remove it" $at $key $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "zephyr.reservedNames" (dict "at" (printf "%s%s." $at $key) "values" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables that the operator adds to Ray's container or reads from it. */}}
{{- define "zephyr.operatorEnv" -}}
[RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_REDIS_ADDRESS, REDIS_PASSWORD, REDIS_USERNAME, RAY_enable_autoscaler_v2]
{{- end -}}
