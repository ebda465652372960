"""Averaged Jacobians that carry feature vectors through the model: one [D, D] matrix per residual-stream point."""

from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.jacobian_lens import export_jacobian_lens, import_jacobian_lens
from querylens_fast.transport.partial import Passage, fit_passage
from querylens_fast.transport.transport import Transport, load_transport

__all__ = [
    "Passage",
    "Transport",
    "export_jacobian_lens",
    "fit_passage",
    "fit_transport",
    "import_jacobian_lens",
    "load_transport",
]
