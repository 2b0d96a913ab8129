{{/* Checks quantities, and writes them as Kubernetes does. */}}

{{/* Fails with one line if an amount is not a quantity that zephyr.quantity can write. Called with
(dict "at" "ray.tmpSize" "amount" … "kind" "size"); the kind is cpu, size, or amount for either. */}}
{{- define "zephyr.checkQuantity" -}}
{{- $text := include "zephyr.digits" .amount -}}
{{- $fraction := "[0-9]+([.][0-9]{1,3})?" -}}
{{- $bytes := "([KMGTPE]i|[kMGTPE])?" -}}
{{- $pattern := get (dict "cpu" (printf "%s|[0-9]+m" $fraction) "size" (print $fraction $bytes) "amount" (printf "%s%s|[0-9]+m" $fraction $bytes)) .kind -}}
{{- $like := get (dict "cpu" "a number of CPUs; write it like 500m, 0.5 or 4" "size" "a size; write it like 512Mi, 10Gi or 1.5T" "amount" "a quantity that the chart accepts; write it like 500m, 2 or 16Gi") .kind -}}
{{- if not (regexMatch (printf "^(%s)$" $pattern) $text) -}}
{{- fail (printf "%s: '%s' is not %s" .at $text $like) -}}
{{- end -}}
{{- if or (hasSuffix "E" $text) (hasSuffix "Ei" $text) (gt (mulf (regexFind "^[0-9]+" $text) (get (include "zephyr.units" . | fromYaml) (regexFind "[A-Za-z]*$" $text))) 9.2e18) -}}
{{- fail (printf "%s: '%s' is too large; lower it" .at $text) -}}
{{- end -}}
{{- if and (ne .kind "amount") (not (regexMatch "[1-9]" $text)) -}}
{{- fail (printf "%s: '%s' is zero; raise it" .at $text) -}}
{{- end -}}
{{- end -}}

{{/* Rules for the chart's own quantities; zephyr.typed checks those in the fields of pods. */}}
{{- define "zephyr.quantityRules" -}}
{{- $v := .Values -}}
{{- range $at, $size := dict "storage.size" $v.storage.size "mlflow.storage.size" $v.mlflow.storage.size "ray.tmpSize" $v.ray.tmpSize "ray.scratchSize" $v.ray.scratchSize }}
{{- include "zephyr.checkQuantity" (dict "at" $at "amount" $size "kind" "size") }}
{{- end }}
{{- $resources := dict "ray.head" $v.ray.head.resources "ray.autoscaler" $v.ray.autoscaler.resources "pipeline.submitter" $v.pipeline.submitter.resources "mlflow" $v.mlflow.resources }}
{{- range $name, $group := $v.workerGroups }}
{{- $_ := set $resources (printf "workerGroups.%s" $name) $group.resources }}
{{- end }}
{{- range $at, $r := $resources }}
{{- range $key, $kind := dict "cpu" "cpu" "cpuRequest" "cpu" "memory" "size" "ephemeralStorage" "size" }}
{{- $amount := get $r $key }}
{{- if or (ne (toString $amount) "") (has $key (list "cpu" "memory")) }}
{{- include "zephyr.checkQuantity" (dict "at" (printf "%s.resources.%s" $at $key) "amount" $amount "kind" $kind) }}
{{- end }}
{{- end }}
{{- if and $r.cpuRequest (gt (include "zephyr.millis" $r.cpuRequest | int64) (include "zephyr.millis" $r.cpu | int64)) }}
{{- fail (printf "%s.resources: cpuRequest %v is more than the limit cpu %v; lower it" $at $r.cpuRequest $r.cpu) }}
{{- end }}
{{- end }}
{{- if lt (include "zephyr.millis" $v.ray.head.resources.memory | int64) 4294967296000 }}
{{- fail (printf "ray.head.resources.memory is %s; a head needs at least 4Gi; raise it" $v.ray.head.resources.memory) }}
{{- end }}
{{- end -}}

{{/* Thousandths per unit. */}}
{{- define "zephyr.units" -}}
{"m": 1, "": 1000, "k": 1000000, "M": 1000000000, "G": 1000000000000, "T": 1000000000000000, "P": 1000000000000000000, "Ki": 1024000, "Mi": 1048576000, "Gi": 1073741824000, "Ti": 1099511627776000, "Pi": 1125899906842624000}
{{- end -}}

{{/* Thousandths of a quantity such as 16Gi, 1.5G, 500m, 0.5 or 134217728. */}}
{{- define "zephyr.millis" -}}
{{- $text := include "zephyr.digits" . -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- $per := get (include "zephyr.units" . | fromYaml) $unit | int64 -}}
{{- $parts := splitn "." 2 (trimSuffix $unit $text) -}}
{{- $fraction := trunc 3 (printf "%s000" ($parts._1 | default "")) -}}
{{- add (mul (int64 $parts._0) $per) (mul (trimPrefix "0" $fraction | trimPrefix "0" | int64) (div $per 1000)) -}}
{{- end -}}

{{/* A number or text as text. Helm reads numbers as floats, which Go writes as 1e+06. */}}
{{- define "zephyr.digits" -}}
{{- if not (kindIs "float64" .) }}{{ . }}{{ else if eq (floor .) . }}{{ int64 . }}{{ else }}{{ printf "%.3f" . }}{{ end -}}
{{- end -}}

{{/* A quantity as Kubernetes writes it, a quoted string: "1Gi" for 1024Mi, "500m" for 0.5. In any other
form, the operator's first update of a RayJob or RayService would change the list of worker groups and
take ownership of it from Helm, and the next upgrade would conflict. */}}
{{- define "zephyr.quantity" -}}
{{- $number := include "zephyr.millis" . | int64 -}}
{{- $base := ternary 1024 1000 (and (hasSuffix "i" (toString .)) (eq (mod $number 1000) 0)) -}}
{{- $suffixes := ternary (list "" "Ki" "Mi" "Gi" "Ti" "Pi") (list "m" "" "k" "M" "G" "T" "P") (eq $base 1024) -}}
{{- if eq $base 1024 }}{{- $number = div $number 1000 }}{{- end }}
{{- if eq $number 0 }}{{- $suffixes = list "" }}{{- end }}
{{- $suffix := first $suffixes -}}
{{- range rest $suffixes }}
{{- if eq (mod $number $base) 0 }}
{{- $number = div $number $base }}{{- $suffix = . }}
{{- end }}
{{- end }}
{{- printf "%d%s" $number $suffix | quote -}}
{{- end -}}
