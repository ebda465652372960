"""Relations: what reads a feature, and which features talk to which, from weights alone.

`readers` (downstream, upstream), `flow` (cosines between dictionaries), `vocabulary` (token → features), `weight_lens`,
`output_features`, `attention` (pairs of features in a head's circuits), `profiles` (strengths in them), `channels`.
Every product is a `tables.RelationTable`; README.md in this folder has a worked example of each.
"""
