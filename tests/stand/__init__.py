"""The stand: real OpenBao and PostgreSQL, and stand-ins for the Kubernetes API and the CSI driver.

Used by the tests, `make demo` and `make bench` alike. Every part is a context manager for synchronous
code, listens on 127.0.0.1 on a free port, keeps its files in a temporary directory of its own, and stops
with its owner, however that one ends.
"""
