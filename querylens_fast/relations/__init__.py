"""Products of features with weights and with other features: what reads a feature, and which features are related.

`readers` (downstream, upstream), `flow` (cosines between dictionaries), `vocabulary` (token → features), `weight_lens`,
`output_features`, `attention` (pairs of features in a head's circuits), `profiles` (strengths in them), `channels`.
Every product is a `tables.RelationTable`; docs/relations has a page with worked examples of each.
"""
