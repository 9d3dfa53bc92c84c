"""The controller process: config, desired state, supervision, kernel devices, JSON-RPC."""
