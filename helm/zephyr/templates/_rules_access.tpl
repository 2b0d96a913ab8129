{{/* Rules about access from outside the release. */}}
{{- define "zephyr.accessRules" -}}
{{- $v := .Values -}}
{{- $policy := $v.networkPolicy -}}
{{- if and (or $v.ingress.enabled $v.gateway.enabled) (not $v.serve.enabled) }}
{{- fail "ingress and gateway lead to chat and judge; set serve.enabled" }}
{{- end }}
{{- if and $v.mlflow.ingress.enabled (not $v.mlflow.enabled) }}
{{- fail "mlflow.ingress.enabled needs MLflow; set mlflow.enabled=true" }}
{{- end }}
{{- $service := printf "mlflow.service.type %s" $v.mlflow.service.type }}
{{- range list (list $v.ingress.enabled "ingress" "serveClients") (list $v.gateway.enabled "gateway" "serveClients") (list $v.mlflow.ingress.enabled "mlflow.ingress" "mlflowClients") (list (and $v.mlflow.enabled (ne $v.mlflow.service.type "ClusterIP")) $service "mlflowClients") }}
{{- if and (first .) $policy.enabled (not (get $policy (last .))) }}
{{- fail (printf "%s is blocked by the network policy; add the clients' namespace to networkPolicy.%s" (index . 1) (last .)) }}
{{- end }}
{{- end }}
{{- range $at, $ingress := dict "ingress" $v.ingress "mlflow.ingress" $v.mlflow.ingress }}
{{- if and $ingress.enabled (not $ingress.host) }}
{{- fail (printf "%s.enabled needs a host; set %s.host" $at $at) }}
{{- end }}
{{- if and $ingress.enabled $ingress.tls.enabled (not $ingress.tls.secretName) }}
{{- fail (printf "%s.tls.enabled needs a certificate; set %s.tls.secretName" $at $at) }}
{{- end }}
{{- end }}

{{- if $v.gateway.enabled }}
{{- if not $v.gateway.parentRefs }}
{{- fail "gateway.enabled needs a Gateway to attach to; set gateway.parentRefs" }}
{{- end }}
{{- if not (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1/HTTPRoute") }}
{{- fail "gateway.enabled: the Gateway API is not on this cluster; install it (for `helm template` add --api-versions gateway.networking.k8s.io/v1/HTTPRoute)" }}
{{- end }}
{{- end }}
{{- if $v.podMonitor.enabled }}
{{- if not (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PodMonitor") }}
{{- fail "podMonitor.enabled: the Prometheus operator is not on this cluster; install it (for `helm template` add --api-versions monitoring.coreos.com/v1/PodMonitor)" }}
{{- end }}
{{- if and $policy.enabled (not $policy.prometheusNamespace) }}
{{- fail "podMonitor.enabled: the network policy blocks Prometheus; set networkPolicy.prometheusNamespace" }}
{{- end }}
{{- end }}
{{- end -}}
