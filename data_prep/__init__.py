"""From a parquet of URLs and captions to a published dataset; nothing here trains."""
