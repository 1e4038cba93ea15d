"""Inference backends, one module per library. A backend imports its library only when a session is opened.

A new backend needs entries in these places:

1. a module in this package with a subclass of :class:`fseft_edge.runtime.encoder.backends.base.EncoderSession`;
2. the function that opens its session, in the table of :mod:`fseft_edge.runtime.encoder.session`;
3. its name and its rank in the orders of speed, in :mod:`fseft_edge.runtime.encoder.backend_choice`;
4. its factor of memory, in :mod:`fseft_edge.runtime.encoder.encoding_plan`;
5. the distributions of its library, in :mod:`fseft_edge.runtime.system.libraries`;
6. its comparison with PyTorch, in ``export/parity.py``; ``auto`` does not use a backend without a parity report.

``docs/developing.md`` describes the steps, including the extra in ``pyproject.toml``, tests and documentation.
"""
