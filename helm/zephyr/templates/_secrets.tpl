{{/* Rejects secrets in the values: they would be readable in pod specs and in Helm's release. The
error lines name the setting and never quote its value. */}}
{{- define "zephyr.refuseSecrets" -}}
{{- $v := .Values -}}
{{- include "zephyr.refuseCredentials" (dict "at" "" "value" (omit $v "recipes")) }}
{{- range $path, $text := $v.recipes }}
{{- if regexMatch "\\.ya?ml$" $path }}
{{- include "zephyr.refuseCredentials" (dict "at" (printf "recipes.%s" $path) "value" $text) }}
{{- end }}
{{- end }}
{{- range $name, $_ := $v.ray.env }}
{{- if regexMatch "(?i)(key|keys|token|password|passwd|secret)$" $name }}
{{- fail (printf "ray.env.%s: a secret must not be among the values; use ray.secretEnv with an existing Secret" $name) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Called with (dict "at" "mlflow" "value" …); recurses into maps and lists. */}}
{{- define "zephyr.refuseCredentials" -}}
{{- $at := .at }}
{{- if kindIs "map" .value }}
{{- /* An EnvVar. */}}
{{- if and (kindIs "string" .value.name) .value.value (regexMatch "(?i)(key|keys|token|password|passwd|secret)$" (toString .value.name)) }}
{{- fail (printf "%s: %s would be readable in the cluster; use valueFrom with an existing Secret" $at .value.name) }}
{{- end }}
{{- range $name, $value := .value }}
{{- include "zephyr.refuseCredentials" (dict "at" (printf "%s.%s" $at $name | trimPrefix ".") "value" $value) }}
{{- end }}
{{- else if kindIs "slice" .value }}
{{- range $number, $value := .value }}
{{- include "zephyr.refuseCredentials" (dict "at" (printf "%s[%d]" $at $number) "value" $value) }}
{{- end }}
{{- else if kindIs "string" .value }}
{{- $userinfo := "://([^\\s/?#]*|[^\\s/@:]*:[0-9]*[^0-9\\s/@][^\\s@]*)@" }}
{{- $parameter := "(?i)://\\S*[?&]([\\w.-]*(key|token|passw(or)?d|secret|signature|credential)|auth|sig|pwd)=\\S" }}
{{- $address := regexMatch "(trackingUri|endpointUrl|destination|redisAddress)$" $at }}
{{- if or (regexMatch $userinfo .value) (regexMatch $parameter .value) (and $address (regexMatch "^[^/]*@" .value)) }}
{{- $instead := dict "mlflow.trackingUri" "set mlflow.auth.existingSecret to a Secret with user name and password" "ray.gcsFaultTolerance.redisAddress" "set ray.gcsFaultTolerance.existingSecret" "mlflow.artifacts.endpointUrl" "set mlflow.artifacts.existingSecret" "mlflow.artifacts.destination" "set mlflow.artifacts.existingSecret" }}
{{- $default := ternary "set api_key_env to the name of the variable that holds the key" "put it into a Secret and name that in ray.secretEnv" (regexMatch "^(recipes|pipeline)" $at) }}
{{- fail (printf "%s contains credentials, which would be readable in the cluster; remove them, and %s" $at (get $instead $at | default $default)) }}
{{- end }}
{{- if and (eq $at "ray.gcsFaultTolerance.redisAddress") (contains "?" .value) }}
{{- fail (printf "%s has parameters; write it like redis:6379" $at) }}
{{- end }}
{{- if and (regexMatch "(existingSecret|\\.secret|secretName)$" $at) (not (regexMatch "^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$" .value)) }}
{{- fail (printf "%s is not the name of a Secret; create one with kubectl, and write its name" $at) }}
{{- end }}
{{- end }}
{{- end -}}
