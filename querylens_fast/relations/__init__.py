"""Relations: what reads a feature, and which features talk to which, from weights alone.

`readers` (downstream, upstream), `flow` (cosines between dictionaries), `vocabulary` (token → features). Every product
is a `tables.RelationTable`; README.md in this folder has a worked example of each.
"""
