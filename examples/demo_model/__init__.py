"""How the embedded demo model and its dictionaries were trained: ``python -m examples.demo_model.train``."""
