"""One suite per protocol, over every implementation of it: what whoever calls through the protocol relies on."""
