"""What runs on a device without torch and without flwr: numpy, ONNX Runtime, gRPC and little else.

Importing this package imports nothing of it.
"""
