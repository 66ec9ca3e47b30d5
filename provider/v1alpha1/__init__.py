"""The driver's gRPC interface, generated from protos/v1alpha1/service.proto by `make stubs`."""
