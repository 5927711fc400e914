"""Messages of the wire and of stored artifacts: `.proto` sources and the code generated from them."""
