"""How similar the stream is before and after each sublayer, over samples."""
