"""The shared vocabulary of the services: protobuf messages and the error tree."""
