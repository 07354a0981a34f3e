"""The Grafana dashboards in ``k8s/monitoring/dashboards`` as code: ``python -m cluster.monitoring``

A tool for development, not part of the installed product, which needs only the JSON. Drawing needs
``grafana-foundation-sdk`` (extra ``dev``); ``cluster.monitoring.catalogue``, which reads the JSON
back for the tests, does not.
"""
