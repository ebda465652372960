"""From feature vectors to token signatures: presets, stream transitions, readouts, and the results and their files."""
