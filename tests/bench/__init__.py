"""`make bench`: how fast the provider is, how little it asks of Vault, and what it takes on a node.

`stand` is what is measured, `load` the driver's side in a process of its own, `scenarios` what is done with them,
`profile` and `sidecar` what is measured beside, `targets` what it must reach, `report` and `chart` the page.
"""
