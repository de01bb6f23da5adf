"""L2P as a MODEL of the host: its network, patcher and loading, LoRAs, 8-bit weights, the stock loaders."""
