"""Real processes on real sockets: ``trellis serve``, ``trellis join``, ``trellis certs`` and ``trellis token``."""
