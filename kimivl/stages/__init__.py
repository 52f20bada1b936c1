"""The three stages: each a LightningModule with its own LightningDataModule."""
