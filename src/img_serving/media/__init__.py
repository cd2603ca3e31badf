"""Picture bytes: base64, PNG chunks, sniffing, limits, transcoding."""
