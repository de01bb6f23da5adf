"""How layers are computed: rotary positions, tiles of the head, and forms that save memory or keep a dtype."""
