"""What a study leaves: analysis.json, tables as parquet, pictures, and one page that tells it all."""
