"""One file per question; each measures Kiln beside its peers and writes its answer as JSON."""
