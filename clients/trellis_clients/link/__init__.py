"""The node's end of the gRPC link: connection, store and, for nodes that train, the client app.

``connection`` and ``store`` import neither torch nor Flower; the edge runtime uses them too.
"""
