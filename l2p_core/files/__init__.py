"""Files: safetensors headers, streamed reading, atomic writing, shards, metadata, quantised formats, paths."""
