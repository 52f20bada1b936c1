"""The data layer: shards -> index -> plan -> packs. It knows neither Lightning nor the model."""
