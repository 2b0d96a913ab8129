{{/* Defines parts shared by objects of all kinds. */}}

{{/* Name, labels and annotations of one of the chart's objects. Called with (dict "root" $ "name" …)
and optionally "labels" and "annotations"; on equal keys these win over the common ones. */}}
{{- define "zephyr.metadata" -}}
name: {{ .name | quote }}
labels:
  {{- merge (dict) (.labels | default dict) (include "zephyr.labels" .root | fromYaml) .root.Values.commonLabels | toYaml | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Metadata of a RayCluster, RayJob or RayService. Called with (dict "root" $ "name" …). */}}
{{- define "zephyr.queuedMetadata" -}}
{{- $labels := include "zephyr.queueLabels" . | fromYaml -}}
{{- include "zephyr.metadata" (dict "root" .root "name" .name "labels" $labels) -}}
{{- end -}}

{{/* Metadata of a claim, which `helm uninstall` leaves if `keep` is true. Called with
(dict "root" $ "name" … "keep" true). */}}
{{- define "zephyr.claimMetadata" -}}
{{- $annotations := ternary (dict "helm.sh/resource-policy" "keep") dict .keep -}}
{{- include "zephyr.metadata" (dict "root" .root "name" .name "annotations" $annotations) -}}
{{- end -}}

{{/* Annotations of the objects that a head pod needs to start. With GCS fault tolerance, the operator
starts such a pod after `helm uninstall`, to delete the cluster's keys in Redis; without these objects
the operator would wait five minutes for the pod and leave the keys. */}}
{{- define "zephyr.keptForCleanup" -}}
{{- if .Values.ray.gcsFaultTolerance.enabled }}
helm.sh/resource-policy: keep
{{- end }}
{{- end -}}

{{/* Name of the ServiceAccount for a purpose: an existing one, or the chart's. Called with
(dict "root" $ "for" "ray"). */}}
{{- define "zephyr.account" -}}
{{- get .root.Values.serviceAccounts .for | default (printf "%s-%s" (include "zephyr.fullname" .root) .for) -}}
{{- end -}}

{{/* Called with (dict "root" $ "ingress" .Values.ingress "name" … "service" … "port" 8000). */}}
{{- define "zephyr.ingress" -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  {{- include "zephyr.metadata" (dict "root" .root "name" .name "annotations" .ingress.annotations) | nindent 2 }}
spec:
  {{- with .ingress.className }}
  ingressClassName: {{ . | quote }}
  {{- end }}
  {{- if .ingress.tls.enabled }}
  tls:
    - hosts: [{{ .ingress.host | quote }}]
      secretName: {{ .ingress.tls.secretName | quote }}
  {{- end }}
  rules:
    - host: {{ .ingress.host | quote }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend:
              service:
                name: {{ .service }}
                port: {number: {{ .port }}}
{{- end -}}
