{{/* Completes a pod with the chart's settings for all pods and with those of its part: ray.head, a
worker group, pipeline.submitter or mlflow. `pod` is the part's own YAML; its first container is the
main one and stays first, because the operator assumes that it is Ray's. Called with
(dict "root" $ "at" "ray.head" "part" .Values.ray.head "pod" …). */}}
{{- define "zephyr.pod" -}}
{{- $values := .root.Values -}}
{{- $at := .at -}}
{{- $part := deepCopy .part -}}
{{- include "zephyr.typed" (dict "at" $at "value" $part) -}}
{{- $pod := fromYaml .pod -}}
{{- $spec := $pod.spec -}}

{{- $_ := merge $pod.metadata.labels ($part.podLabels | default dict) $values.commonLabels -}}
{{- with merge (dict) ($pod.metadata.annotations | default dict) ($part.podAnnotations | default dict) -}}
{{- $_ := set $pod.metadata "annotations" . -}}
{{- end -}}

{{- $_ := set $spec "enableServiceLinks" false -}}
{{- $_ := set $spec "securityContext" (include "zephyr.podSecurity" $.root | fromYaml) -}}
{{- range $values.image.pullSecrets -}}
{{- $_ := set $spec "imagePullSecrets" (append ($spec.imagePullSecrets | default list) (dict "name" .)) -}}
{{- end -}}
{{- range $key := list "nodeSelector" "tolerations" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" -}}
{{- with get $part $key -}}
{{- $_ := set $spec $key . -}}
{{- end -}}
{{- end -}}
{{- with merge (dict) ($spec.affinity | default dict) ($part.affinity | default dict) -}}
{{- $_ := set $spec "affinity" . -}}
{{- end -}}

{{- range $container := concat ($spec.initContainers | default list) $spec.containers -}}
{{- $_ := set $container "imagePullPolicy" $values.image.pullPolicy -}}
{{- $_ := set $container "securityContext" (include "zephyr.containerSecurity" $.root | fromYaml) -}}
{{- include "zephyr.append" (dict "at" $at "part" $part "extra" "extraEnv" "to" $container "key" "env" "by" "name") -}}
{{- include "zephyr.append" (dict "at" $at "part" $part "extra" "extraVolumeMounts" "to" $container "key" "volumeMounts" "by" "mountPath") -}}
{{- end -}}
{{- $main := first $spec.containers -}}
{{- range $key := list "startupProbe" "readinessProbe" "livenessProbe" -}}
{{- with get $part $key -}}
{{- $_ := set $main $key (merge . (get $main $key | default dict)) -}}
{{- end -}}
{{- end -}}

{{- /* Users' containers get the settings that Pod Security `restricted` requires, unless they have
their own (`merge` would overwrite a false one). The operator would add empty resources. */ -}}
{{- $users := dict -}}
{{- range $extra := list "initContainers" "sidecars" -}}
{{- range get $part $extra | default list -}}
{{- $container := merge . (dict "resources" dict "securityContext" dict) -}}
{{- range $key, $value := include "zephyr.containerSecurity" $.root | fromYaml -}}
{{- if not (hasKey $container.securityContext $key) -}}
{{- $_ := set $container.securityContext $key $value -}}
{{- end -}}
{{- end -}}
{{- $_ := set $users $extra (append (get $users $extra | default list) $container) -}}
{{- end -}}
{{- end -}}
{{- include "zephyr.append" (dict "at" $at "part" $users "extra" "initContainers" "to" $spec "key" "initContainers" "by" "name") -}}
{{- include "zephyr.append" (dict "at" $at "part" $users "extra" "sidecars" "to" $spec "key" "containers" "by" "name") -}}
{{- include "zephyr.append" (dict "at" $at "part" $part "extra" "extraVolumes" "to" $spec "key" "volumes" "by" "name") -}}
{{- toYaml $pod -}}
{{- end -}}

{{/* Appends the list part[extra] to to[key]. Fails if two entries have the same `by`, because the API
server would reject them. */}}
{{- define "zephyr.append" -}}
{{- with get .part .extra -}}
{{- $all := concat (get $.to $.key | default list) . -}}
{{- $seen := dict -}}
{{- range $all -}}
{{- $id := get . $.by -}}
{{- if hasKey $seen $id -}}
{{- fail (printf "%s.%s: %s '%s' exists already; rename it" $.at $.extra $.by $id) -}}
{{- end -}}
{{- $_ := set $seen $id true -}}
{{- end -}}
{{- $_ := set $.to $.key $all -}}
{{- end -}}
{{- end -}}

{{/* Normalizes settings to the form in which the operator writes them back (see zephyr.quantity), and
checks their quantities. Recurses into maps and lists. Called with (dict "at" "ray.head" "value" …). */}}
{{- define "zephyr.typed" -}}
{{- $at := .at -}}
{{- $map := .value -}}
{{- /* In these fields zero means unset, unlike in fields whose Go type is a pointer. */ -}}
{{- $zero := list "chapAuthDiscovery" "chapAuthSession" "failureThreshold" "hostPort" "initialDelaySeconds" "limits" "partition" "periodSeconds" "readOnly" "requests" "sslEnabled" "stdin" "stdinOnce" "successThreshold" "timeoutSeconds" "tty" -}}
{{- /* Fields whose names and texts users choose; these stay as they are. */ -}}
{{- $texts := list "annotations" "httpHeaders" "labels" "matchLabels" "nodeSelector" "options" "podAnnotations" "podLabels" "userAnnotations" "volumeAttributes" -}}
{{- /* Values that the operator writes back in these fields even if they are missing. */ -}}
{{- $always := dict "azureDisk" (dict "fsType" "ext4" "readOnly" false) "fileKeyRef" (dict "optional" false) "grpc" (dict "service" "") "iscsi" (dict "iscsiInterface" "default") "rbd" (dict "keyring" "/etc/ceph/keyring" "pool" "rbd" "user" "admin") "resourceFieldRef" (dict "divisor" "0") "scaleIO" (dict "fsType" "xfs" "storageMode" "ThinProvisioned") "volumeClaimTemplate" (dict "metadata" dict) -}}
{{- if kindIs "slice" $map -}}
{{- range $number, $value := $map -}}
{{- include "zephyr.typed" (dict "at" (printf "%s[%d]" $at $number) "value" $value) -}}
{{- end -}}
{{- else if kindIs "map" $map -}}
{{- range $key, $value := $map -}}
{{- $here := printf "%s.%s" $at $key -}}
{{- if and (eq $key "storageClassName") (not (kindIs "invalid" $value)) -}}
{{- /* Empty means no class, not the default class. */ -}}
{{- else if and (empty $value) (or (has (kindOf $value) (list "invalid" "string" "slice")) (has $key (concat $zero $texts))) -}}
{{- $_ := unset $map $key -}}
{{- else if has $key (list "limits" "requests") -}}
{{- range $name, $amount := $value -}}
{{- include "zephyr.checkQuantity" (dict "at" (printf "%s.%s" $here $name) "amount" $amount "kind" "amount") -}}
{{- $_ := set $value $name (include "zephyr.quantity" $amount | trimAll "\"") -}}
{{- end -}}
{{- else if has $key (list "sizeLimit" "divisor") -}}
{{- include "zephyr.checkQuantity" (dict "at" $here "amount" $value "kind" "amount") -}}
{{- $_ := set $map $key (include "zephyr.quantity" $value | trimAll "\"") -}}
{{- else if not (has $key $texts) -}}
{{- include "zephyr.typed" (dict "at" $here "value" $value) -}}
{{- range $name, $default := get $always $key | default dict -}}
{{- if not (hasKey $value $name) -}}
{{- $_ := set $value $name $default -}}
{{- end -}}
{{- end -}}
{{- if eq $key "volumeClaimTemplate" -}}
{{- $_ := set $value.spec "resources" ($value.spec.resources | default dict) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (hasKey $map "containerPort") (not $map.protocol) -}}
{{- $_ := set $map "protocol" "TCP" -}}
{{- end -}}
{{- end -}}
{{- end -}}
