"""The command line's rooms: parsing, loading, running, printing; `resens_fast.cli` ties them together."""
