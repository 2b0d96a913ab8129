{{/* Defines the labels and rules that network policies share. */}}

{{/* Labels of a pod: those that select its component, and its part if `zephyr submit` also creates such
pods. Called with (dict "root" $ "component" "pipeline"). */}}
{{- define "zephyr.podLabels" -}}
{{ include "zephyr.selector" . }}
{{- if has .component (list "pipeline" "submitter") }}
zephyr-ray/part: {{ .component }}
{{- end }}
{{- end -}}

{{/* Labels by which policies select a component. For jobs and their submitters, they match all in the
namespace: this release's, and those of `zephyr submit`, which carry no release name. */}}
{{- define "zephyr.policySelector" -}}
{{- if has .component (list "pipeline" "submitter") -}}
zephyr-ray/part: {{ .component }}
{{- else -}}
{{ include "zephyr.selector" . }}
{{- end -}}
{{- end -}}

{{/* A peer: the pods of a component in this namespace. */}}
{{- define "zephyr.peer" -}}
- podSelector:
    matchLabels:
      {{- include "zephyr.policySelector" . | nindent 6 }}
{{- end -}}

{{- define "zephyr.clientPeer" -}}
- podSelector:
    matchLabels:
      zephyr-ray/client: "true"
{{- end -}}

{{/* Called with the name of a namespace. */}}
{{- define "zephyr.namespacePeer" -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ . | quote }}
{{- end -}}

{{/* An egress rule to a component. Called with (dict "root" $ "component" "mlflow" "port" 5000). */}}
{{- define "zephyr.egressTo" -}}
- to:
    {{- include "zephyr.peer" . | nindent 4 }}
  ports:
    - {port: {{ .port }}, protocol: TCP}
{{- end -}}

{{- define "zephyr.egressDns" -}}
{{- $dns := .Values.networkPolicy.dns -}}
- to:
    {{- include "zephyr.namespacePeer" $dns.namespace | nindent 4 }}
    # NodeLocal DNSCache.
    - ipBlock:
        cidr: 169.254.20.10/32
  ports:
    {{- range $dns.ports }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}

{{- define "zephyr.egressInternet" -}}
{{- with .Values.networkPolicy.internetPorts }}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        # Private networks, and the cloud's metadata server with its credentials.
        except: [10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16]
  ports:
    {{- range . }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- end -}}
